"""Inspects a configuration, its data, its memory and its cost without training."""
