"""Counts the operations of an epoch, to compare B-DPO with the host's own DPO on the same pairs.

The counts use only the lengths of the data and the model's configuration. Multiplying T tokens by N
weights takes 2 N T operations in the forward pass, as many for the gradient of the inputs and as
many for the gradient of the weights. Attention of q queries to k keys takes 4 q k operations for
each hidden entry of its heads, half of that if it is causal. Padding is not counted, although the
host has more of it. Neither are cheap operations: norms, sampling, the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.inspection.plan import Plan


class Cost(NamedTuple):
    """Operations of one epoch over all pairs.

    Attributes:
        host: of the host's own DPO, which runs the reference model in each step.
        ours: of our training steps.
        scoring: of the reference pass, which runs once.
        plain_scoring: of the reference pass at `bdpo_alpha: 0`.
    """

    host: float
    ours: float
    scoring: float
    plain_scoring: float


def epoch_cost(
    shape: Shape, plan: Plan, pairs: Sequence[Pair], null_tokens: int, *, shared: bool, mi: bool
) -> Cost:
    """Counts the operations of an epoch.

    Args:
        shape: the sizes of the model.
        plan: the properties of the run.
        pairs: the training pairs.
        null_tokens: number of tokens of the null prompt.
        shared: whether the common beginning of a pair is computed once.
        mi: whether the mutual information is measured.
    """
    full = plan.rank == 0
    again = 1 if plan.checkpointing else 0
    host = ours = scoring = plain = 0.0
    for pair in pairs:
        prompts = [len(side.prompt_ids) for side in pair]
        responses = [len(side.completion_ids) for side in pair]
        whole = [p + r for p, r in zip(prompts, responses, strict=True)]
        same = shared and list(pair.chosen.prompt_ids) == list(pair.rejected.prompt_ids)
        rows = [(0, whole[0]), (prompts[1], responses[1])] if same else [(0, n) for n in whole]
        # the policy, then the reference model
        host += _pass(shape, [(0, n) for n in whole], sum(whole), full=full, again=again)
        host += _forward(shape, [(0, n) for n in whole], sum(whole))
        ours += _pass(shape, rows, sum(responses), full=full, again=again)
        bare = _forward(shape, rows, sum(responses))
        after_null = [(null_tokens, r) if shared else (0, null_tokens + r) for r in responses]
        plain += bare
        scoring += bare + (_forward(shape, after_null, sum(responses)) if mi else 0)
    return Cost(host, ours, scoring, plain)


def _forward(shape: Shape, rows: Sequence[tuple[int, int]], read: int) -> float:
    """Counts the operations of a forward pass.

    `rows` are segments, each (tokens before it, tokens in it). Logits are computed at `read`
    positions."""
    tokens = sum(n for _, n in rows)
    return 2 * shape.body * tokens + 2 * shape.head * read + _attention(shape, rows)


def _pass(
    shape: Shape, rows: Sequence[tuple[int, int]], read: int, *, full: bool, again: int
) -> float:
    """Counts a forward and a backward pass.

    `again` is 1 if the backward pass runs the layers again (gradient checkpointing)."""
    tokens = sum(n for _, n in rows)
    layers = 2 * (2 + again + full)
    head = 2 * (2 + full)
    return (
        layers * shape.body * tokens
        + head * shape.head * read
        + (3.5 + again) * _attention(shape, rows)  # flash kernels recompute the attention scores
    )


def _attention(shape: Shape, rows: Sequence[tuple[int, int]]) -> float:
    return 4 * shape.layers * shape.heads * sum(n * before + n * n / 2 for before, n in rows)
