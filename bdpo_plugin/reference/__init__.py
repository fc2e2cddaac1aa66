"""The frozen model's pass over the data: log-probabilities and mutual information, once.

A :class:`~bdpo_plugin.reference.scoring.ScoreRequest` asks for the score of one completion after
one prompt: the pair's own, or the null prompt. Two pairs with the same prompt and completion need
one request.
"""
