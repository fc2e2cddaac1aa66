"""Reads recipes, compares runs with their expected numbers, and checks that they can be shared."""
