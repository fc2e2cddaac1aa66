"""Thin layers over the trainer, one package a host, independent of each other."""
