"""Converts public preference data to pairs that both hosts read."""
