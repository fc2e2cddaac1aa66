"""Forward passes of any causal language model, with its logits read at response positions only."""
