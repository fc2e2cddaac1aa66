"""What the end-to-end tests hold a run against, held against the package on a small case."""

import pytest
import torch
import truth
from torch import Tensor

from bdpo_plugin.objective import (
    ChosenRejected,
    balance_weights,
    bdpo_loss,
    mutual_information,
)


def test_batch_is_the_mean_over_pairs_and_the_sft_term() -> None:
    """Two bigram models, pairs of unequal length, a per-pair loss and TRL's `sft`."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 7, 7, dtype=torch.float64)
    prompts, null = [[1, 2], [3]], [0]
    chosen, rejected = [[4, 5, 6], [1, 1]], [[2], [6, 5, 4, 3]]
    scores = [
        truth.score_pair(lambda ids: reference[ids].numpy(), x, null, y_w, y_l)
        for x, y_w, y_l in zip(prompts, chosen, rejected, strict=True)
    ]

    def logps(model: Tensor, starts: list[list[int]], responses: list[list[int]]) -> Tensor:
        log_probs, sums = model.log_softmax(-1), []
        for start, y in zip(starts, responses, strict=True):
            sums.append(log_probs[[*start, *y[:-1]], [*start[1:], *y]][len(start) - 1 :].sum())
        return torch.stack(sums)

    mi = [
        mutual_information(
            logps(reference, prompts, y),
            logps(reference, [null] * 2, y),
            torch.tensor([len(tokens) for tokens in y]),
        )
        for y in (chosen, rejected)
    ]
    refs, policies = (
        ChosenRejected(*(logps(model, prompts, y) for y in (chosen, rejected)))
        for model in (reference, policy)
    )
    ours = bdpo_loss(policies, refs, balance_weights(*mi)).mean() - 0.7 * policies.chosen.sum() / 5
    theirs = truth.batch_loss(
        lambda ids: policy[ids].numpy(),
        *(prompts, chosen, rejected, scores),
        loss_types=["sigmoid", "sft"],
        loss_weights=[1.0, 0.7],
    )
    assert ours.item() == pytest.approx(theirs, abs=1e-12)
