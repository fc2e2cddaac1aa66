"""Whether what a model says of a sequence depends on the padding of its batch.

It must not, or a sequence is scored as one thing and trained on as another, since the two batches
differ in width. Some architectures get it wrong: an indexer that chooses its tokens among the
padding too, experts with room for so many tokens of a batch. A sequence is run alone and padded;
what rounding does to the model is measured beside it, by its embeddings changed by a rounding of
the dtype in which the arithmetic is done, as that grows with depth and routers enlarge it.

n tokens in the sequence, N of them read, V vocabulary entries.
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

#: Tokens that are added on a side, and those that are read at most, the last of the sequence.
_PADDING = _READ = 64

#: Fields of a configuration that say how many tokens a layer looks at. A sequence must be longer
#: to show what depends on it.
_REACH = re.compile(r"window|chunk_size|block_size|top_?k(_tokens)?$")
_FIELDS_OF_EXPERTS = re.compile(r"expert|moe|group|router")


class PaddingEffect(NamedTuple):
    """What padding on one side does to a sequence.

    Attributes:
        nats: the largest change of the log-probability of one of its tokens.
        times_rounding: the change of the logits, in units of the most that rounding may do.
        unknown: why it could not be tried, in words.
    """

    nats: float = 0
    times_rounding: float = 0
    unknown: str = ""

    @property
    def beyond_rounding(self) -> bool:
        # not `> 1`, which no NaN is
        return not self.times_rounding <= 1


class Padding(NamedTuple):
    """What padding does to a model's numbers, by the side that it is on."""

    right: PaddingEffect
    left: PaddingEffect


def reach(config: Any) -> int:
    """The most tokens that a layer of the model looks at, as far as its configuration limits
    them; 0 where it does not."""
    found = [
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and _REACH.search(name) and not _FIELDS_OF_EXPERTS.search(name)
    ]
    return max(found, default=0)


def try_padding(
    model: nn.Module,
    layer: nn.Module | None,
    inputs: dict[str, Any],
    ids: Tensor,
    limit: float = math.inf,
) -> Padding:
    """What padding does to the model's numbers; to be called in evaluation mode, without gradient.

    The number of forward passes is always the same: a sharded model needs it.

    Args:
        layer: its output layer, if it tells.
        inputs: of the model's forward, of some batch.
        ids: (n,) the tokens of a sequence, on the CPU.
        limit: tokens that a row may have.
    """
    padding = int(min(_PADDING, limit // 2))
    config = unwrapped(model).config.get_text_config()
    ids = ids[: int(min(reach(config) + _READ, limit - padding))]
    read = min(len(ids), _READ)
    shape = inputs["input_ids"].shape
    device = inputs["input_ids"].device
    rounded = RoundedEmbeddings(unwrapped(model))

    def logits(left: int = 0, right: int = 0) -> Tensor:
        """(N, V), centred: a constant makes no difference to what they say."""
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
        # Most tokens have the same bits, so that the layers round alike in both rows: what differs
        # by more than rounding usually does differs for another reason, in however few tokens.
        return PaddingEffect(nats, float(found.max()) / tolerance.usual(0.5))

    return Padding(effect(logits(right=padding)), effect(logits(left=padding)))
