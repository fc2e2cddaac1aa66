"""Measures whether the logits of a sequence depend on the padding of its batch. The probe calls it.

They must not: the batches of scoring and of training differ in width, so the same sequence would
get different log-probabilities in the two. Some architectures depend on padding: those with an
indexer that also selects padding tokens, or with experts of a limited capacity per batch. A
sequence runs alone and padded, and the change of its logits is compared with the effect of
rounding. That effect is measured too, by perturbing the embeddings by one rounding of the dtype in
which the arithmetic is done, because it grows with depth and routers amplify it.

Shapes: n tokens in the sequence, N of them read, V vocabulary entries.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdpo_plugin.model.head import forward_calling, select
from bdpo_plugin.model.rounding import RoundedEmbeddings, Tolerance, changed, rounding_of
from bdpo_plugin.model.traits import unwrapped

#: The number of padding tokens added on one side, and the most tokens read, the last of the
#: sequence.
_PADDING = _READ = 64

#: Fields of a configuration that limit how many tokens a layer looks at. Only a longer sequence
#: shows an effect of such a limit.
_REACH = re.compile(r"window|chunk_size|block_size|top_?k(_tokens)?$")
#: Fields that do not, although they are named alike: of experts, and `max_window_layers`.
_OTHER_FIELDS = re.compile(r"expert|moe|group|router|layers")


class PaddingEffect(NamedTuple):
    """Effect of padding on one side of a sequence.

    Attributes:
        nats: the largest change of a token's log-probability, in nats.
        times_rounding: the change of the logits, divided by the largest change that rounding
            explains.
        unknown: why the effect could not be measured; empty if it was.
    """

    nats: float = 0
    times_rounding: float = 0
    unknown: str = ""

    @property
    def beyond_rounding(self) -> bool:
        # `> 1` would be False for NaN
        return not self.times_rounding <= 1


class Padding(NamedTuple):
    """Effects of padding on a model's logits, on the right and on the left."""

    right: PaddingEffect
    left: PaddingEffect


def reach(config: Any) -> int:
    """Returns the largest number of tokens that the configuration lets a layer look at; 0 where it
    sets no limit."""
    found = [
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and _REACH.search(name) and not _OTHER_FIELDS.search(name)
    ]
    return max(found, default=0)


def try_padding(
    model: nn.Module,
    layer: nn.Module | None,
    inputs: dict[str, Any],
    ids: Tensor,
    limit: float = math.inf,
) -> Padding:
    """Measures the effect of padding on the model's logits. Call it in evaluation mode, without
    gradient.

    The number of forward passes is always the same, as a sharded model requires.

    Args:
        model: a causal language model, in any wrapper.
        layer: its output layer, or None if the model does not name one.
        inputs: the arguments of the model's forward for some batch.
        ids: (n,) the token ids of a sequence, on the CPU.
        limit: the most tokens that a row may have.
    """
    padding = int(min(_PADDING, limit // 2))
    config = unwrapped(model).config.get_text_config()
    ids = ids[: int(min(reach(config) + _READ, limit - padding))]
    read = min(len(ids), _READ)
    shape = inputs["input_ids"].shape
    device = inputs["input_ids"].device
    rounded = RoundedEmbeddings(unwrapped(model))

    def logits(left: int = 0, right: int = 0) -> Tensor:
        """Returns the (N, V) logits, centred, because adding a constant changes no probability."""
        padded = nn.functional.pad(ids, (left, right))[None]
        mask = nn.functional.pad(torch.ones_like(ids), (left, right))[None]
        where = torch.zeros_like(mask, dtype=torch.bool)
        where[0, left + len(ids) - read : left + len(ids)] = True
        arguments = {
            name: value[:1, :1].expand(1, mask.shape[1], *value.shape[2:])
            if isinstance(value, Tensor) and value.shape[:2] == shape
            else value
            for name, value in inputs.items()
        }
        arguments |= {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
        found, outputs = forward_calling(
            model, layer, where, lambda states: states, arguments, instead=False
        )
        whole: Tensor = select(outputs.logits, where) if found is None else outputs.logits[0]
        return whole.float() - whole.float().mean(dim=-1, keepdim=True)

    alone = logits()
    with rounded:
        twice = [changed(logits(), alone) for _ in range(2)]
    rounding = rounding_of(model, rounded.dtypes, alone.device)
    tolerance = Tolerance(unwrapped(model), rounding, twice)

    def effect(other: Tensor) -> PaddingEffect:
        after = ids[len(ids) - read + 1 :].to(alone.device)[:, None]
        own = [x[:-1].log_softmax(dim=-1).gather(-1, after) for x in (alone, other)]
        nats = float((own[0] - own[1]).abs().max()) if len(after) else 0.0
        found = changed(other, alone)
        if tolerance.exact or float(found.median()):
            return PaddingEffect(nats, tolerance.of(found) / tolerance.allowed)
        # Most tokens are bitwise equal, so the layers round alike in both rows. A larger difference
        # than the usual rounding then has another cause, even if only a few tokens differ.
        return PaddingEffect(nats, float(found.max()) / tolerance.usual(0.5))

    return Padding(effect(logits(right=padding)), effect(logits(left=padding)))
