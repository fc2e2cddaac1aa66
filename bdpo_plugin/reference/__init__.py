"""The frozen model's pass over the data: log-probabilities and mutual information, once."""
