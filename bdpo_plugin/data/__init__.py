"""Checks of the user's rows, and the preference pairs of token ids made from them."""
