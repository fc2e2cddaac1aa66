"""Computes the loss and the metrics of one batch. The trainer mixin calls
:func:`preference_step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.head import sum_by_row
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.objective import BalanceWeights, ChosenRejected, bdpo_loss
from bdpo_plugin.training.batch import PreferenceBatch

#: The metrics of a batch by name, each as (sum, count) of this rank.
Metrics = dict[str, tuple[Tensor, Tensor]]
#: The only metric that is a sum over the ranks and not a mean.
TOTAL = "num_tokens"


@dataclass(frozen=True)
class LossTerms:
    """The loss terms of a run: their names, weights and parameters.

    The names are those of :data:`~bdpo_plugin.settings.LOSS_TYPES` and ``sft_by_pair``. The latter
    is the cross-entropy of the chosen response per token, averaged over the pairs, while ``sft`` is
    averaged over all chosen tokens.
    """

    types: Sequence[str]
    weights: Sequence[float]
    beta: float
    label_smoothing: float = 0.0


def preference_step(
    reader: ResponseReader,
    model: nn.Module,
    batch: PreferenceBatch,
    scores: Mapping[str, Tensor],
    terms: LossTerms,
    pair_loss: Callable[..., Tensor] = bdpo_loss,
) -> tuple[Tensor, Metrics, Any]:
    """Runs the policy on a batch of B pairs and computes the loss (method section 7).

    Args:
        scores: the columns of :data:`~bdpo_plugin.training.score_columns.SCORE_COLUMNS`, each (B,).
        pair_loss: a function with the arguments of :func:`bdpo_loss` that returns the loss of each
            pair, (B,).

    Returns:
        The loss, a scalar; the metrics; the model's outputs.
    """
    weights = BalanceWeights(
        scores["bdpo_weight_chosen"], scores["bdpo_weight_rejected"], scores["bdpo_scale"]
    )
    reference = ChosenRejected(scores["bdpo_ref_chosen_logps"], scores["bdpo_ref_rejected_logps"])
    device = batch.completion_mask.device
    ids, mask, completion_mask = batch.on_cpu
    # the states at a token predict the next token
    read_at = F.pad(completion_mask[:, 1:], (0, 1))
    labels, counts = ids[:, 1:][completion_mask[:, 1:]], read_at.sum(dim=1)
    tokens, outputs = reader.token_statistics(
        model,
        read_at,
        to_device(labels, device),
        device=device,
        **batch.inputs | {"input_ids": ids, "attention_mask": mask},
    )
    policy = ChosenRejected(*sum_by_row(tokens.logps, read_at).chunk(2))
    lengths = ChosenRejected(*to_device(counts, device).chunk(2))
    # the chosen rows come first, and so do their tokens
    of_chosen = to_device(torch.arange(len(labels)) < counts[: len(counts) // 2].sum(), device)

    loss = torch.zeros((), device=policy.chosen.device)
    for loss_type, loss_weight in zip(terms.types, terms.weights, strict=True):
        if loss_type == "sft":
            term = -(tokens.logps * of_chosen).sum() / of_chosen.sum()
        elif loss_type == "sft_by_pair":
            term = -(policy.chosen / lengths.chosen).mean()
        else:
            term = pair_loss(
                policy,
                reference,
                weights,
                beta=terms.beta,
                loss_type=loss_type,
                label_smoothing=terms.label_smoothing,
                lengths=lengths,
            ).mean()
        loss = loss + loss_weight * term

    with torch.no_grad():
        # unweighted DPO rewards, so that they can be compared across methods
        chosen_rewards = terms.beta * (policy.chosen - reference.chosen)
        rejected_rewards = terms.beta * (policy.rejected - reference.rejected)
        mi_chosen, mi_rejected = scores["bdpo_mi_chosen"], scores["bdpo_mi_rejected"]
        per_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "bdpo/weight_chosen": weights.chosen,
            "bdpo/weight_rejected": weights.rejected,
            "bdpo/scale": weights.scale,
        }
        metrics = {k: (v.sum(), torch.full_like(v[0], len(v))) for k, v in per_pair.items()}
        measured = ~mi_chosen.isnan()
        for name, values, where in (
            ("bdpo/mi_chosen", mi_chosen, measured),
            ("bdpo/mi_rejected", mi_rejected, measured),
            ("bdpo/imbalance", (mi_chosen - mi_rejected).abs(), measured),
            ("bdpo/chosen_share", (mi_chosen > mi_rejected).float(), measured),
            ("entropy", tokens.entropy, torch.ones_like(of_chosen)),
            ("mean_token_accuracy", tokens.correct, of_chosen),
            ("logits/chosen", tokens.mean_logits, of_chosen),
            ("logits/rejected", tokens.mean_logits, ~of_chosen),
        ):
            metrics[name] = (values.where(where, 0).sum(), where.sum())
        metrics[TOTAL] = (to_device(mask.sum(), device), torch.ones_like(policy.chosen[0]))
    return loss, metrics, outputs


@dataclass
class MetricSums:
    """Collects the metrics of the steps since the last log, summed over the ranks, on the device.

    Attributes:
        reduce: sums a tensor over the ranks.
        names: the names of the metrics.
        steps: for each step the (sum, count) of each metric.
    """

    reduce: Callable[[Tensor], Tensor]
    names: list[str] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def add(self, metrics: Metrics) -> None:
        """Adds the (sum, count) of each metric of one step."""
        self.names = list(metrics)
        pairs = [torch.stack([t.detach().float() for t in pair]) for pair in metrics.values()]
        self.steps.append(self.reduce(torch.stack(pairs)))

    def drain(self) -> list[dict[str, float]]:
        """Returns the mean of each metric in each step, without metrics of count 0, and forgets the
        steps."""
        rows = torch.stack(self.steps).tolist() if self.steps else []
        self.steps = []
        return [
            {
                name: total if name == TOTAL else total / count
                for name, (total, count) in zip(self.names, row, strict=True)
                if count
            }
            for row in rows
        ]
