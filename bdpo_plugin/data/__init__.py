"""The user's rows, and the preference pairs of token ids that are made of them."""
