"""The method as tensor functions that depend on torch only: no model, no dataset. The reference
pass and the training step call them.

Notation of the shapes: B pairs in a batch, N response positions, V vocabulary entries.
Equations and section numbers ("method section 5") are those of docs/method.md.
"""

from bdpo_plugin.objective.balance import BalanceWeights, balance_weights
from bdpo_plugin.objective.loss import ChosenRejected, bdpo_loss
from bdpo_plugin.objective.mutual_information import mutual_information

__all__ = [
    "BalanceWeights",
    "ChosenRejected",
    "balance_weights",
    "bdpo_loss",
    "mutual_information",
]
