"""Adapters for the hosts: one package each, which contains only what differs between hosts."""
