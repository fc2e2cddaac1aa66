"""The reference pass: log-probabilities and mutual information of all pairs under the frozen
reference model, computed once.

A :class:`~bdpo_plugin.reference.scoring.ScoreRequest` asks for the score of one completion after
one prompt: the pair's own, or the null prompt. Two pairs with the same prompt and completion need
one request.
"""
