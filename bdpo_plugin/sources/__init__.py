"""Public preference data, as the pairs that both hosts read."""
