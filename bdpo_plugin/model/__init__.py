"""Any causal language model, read at its response positions."""
