"""A recipe as a file, the numbers that it expects, and what of it may be shared."""
