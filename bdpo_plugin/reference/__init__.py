"""The frozen model's pass over the data: log-probabilities and mutual information, once.

A *pair* has two *sides*, each a prompt and a response. A *job* is one response to score after one
prompt, the side's own or the null prompt; pairs that want the same share it. A *unit* is what
stays together in a batch, as it begins alike: one or two sequences, and the jobs that they are of.
"""
