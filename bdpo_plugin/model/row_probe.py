"""Probes whether a model can run a batch packed in one row, in which a common prefix stands once.
:mod:`~bdpo_plugin.model.probe` calls it, and the response reader for batches with other rules.

- Do the sequences of a row stay independent? Attention gives masked tokens a weight of exactly
  zero. So if the tokens of one sequence are replaced, not one bit of the others may change, in any
  dtype. Some models change bits even in rows of one sequence each (because of the load of their
  experts, or of kernels that are not deterministic); the probe measures that change separately and
  allows it. If tokens of the common prefix or positions are replaced, some bits must change. A
  convolution, a recurrent state or an ignored mask shows at once.
- Are the values right? The probe compares them within what rounding explains.

Shapes: L tokens in each probed sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_plugin.model.attention_probe import AttentionTrial
from bdpo_plugin.model.head import forward_calling
from bdpo_plugin.model.rounding import RoundedEmbeddings, Tolerance, changed, rounding_of
from bdpo_plugin.model.shared_prefix import in_order, pack
from bdpo_plugin.model.traits import RowRules, is_sharded, unwrapped, windows_of
from bdpo_plugin.model.tree_attention import ARGUMENT, PrefixGroup

#: The number of tokens of each of the three sequences; the first two share their first quarter.
_LENGTH = 32

#: Exceptions that a model may raise if it cannot read such rows, for example because it takes the
#: mask of a row for that of a padded batch.
CANNOT = (ValueError, TypeError, IndexError, RuntimeError)


@dataclass(frozen=True)
class SharedPrefixSupport:
    """Whether a model can run a batch packed in one row, in which a common prefix stands once.

    Attributes:
        shared: whether it can.
        windows: whether its layers pass their sliding window to attention, so that sequences may
            be longer than the window.
        each_once: whether the probe ran every token exactly once, as :class:`RowRules` required.
        why: the reason if it cannot; else empty.
    """

    shared: bool = False
    windows: bool = False
    each_once: bool = False
    why: str = ""


def try_rows(
    model: nn.Module,
    layer: nn.Module,
    rules: RowRules,
    inputs: dict[str, Any],
    tokens: Tensor,
) -> SharedPrefixSupport:
    """Probes whether the model can run a batch packed in one row. Call it without gradient.

    The number of forward passes is the same in every rank, as a sharded model requires.

    Args:
        model: a causal language model, in any wrapper.
        layer: the model's output layer.
        rules: the limits on rows for that batch.
        inputs: the arguments of the model's forward for some batch.
        tokens: (N,) token ids of that batch, from which the probed sequences are made.
    """
    try:
        return _Trial(model, layer, rules, inputs, tokens).of_values()
    except torch.OutOfMemoryError:
        raise
    except CANNOT as error:
        return SharedPrefixSupport(why=in_short(error))


class _Trial:
    """Compares three sequences of L tokens, each in a row of its own, with the same three in one
    row. The first two share a prefix, which stands once in the common row."""

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        rules: RowRules,
        inputs: dict[str, Any],
        tokens: Tensor,
    ) -> None:
        self._model, self._layer, self._rules, self._inputs = model, layer, rules, inputs
        length = int(min(_LENGTH, rules.widest // 3))
        self._common = common = length // 4
        kinds, ranks = tokens.unique(return_inverse=True)
        ranks = ranks.repeat(-(-3 * length // len(ranks)))[: 3 * length].view(3, length)
        # if there are few distinct tokens, the sequences at least begin at different ones
        ranks = ranks + torch.arange(3)[:, None]
        ranks[1, :common] = ranks[0, :common]
        another = 1 + torch.arange(length) % 3
        neighbours, second, beginning = ranks.clone(), ranks.clone(), ranks.clone()
        neighbours[0, common:] += another[common:]
        neighbours[2] += another
        second[1, common:] += another[common:]
        beginning[:2, common - 1] += 1
        every = (ranks, neighbours, second, beginning)
        self._ids, self._neighbours, self._second, self._beginning = (
            kinds[some % len(kinds)] for some in every
        )
        one = [PrefixGroup((0,)), PrefixGroup((1,)), PrefixGroup((2,))]
        self._groups = one if rules.each_once else [PrefixGroup((0, 1), common), PrefixGroup((2,))]

    def _read(
        self,
        ids: Tensor,
        *,
        row: bool = False,
        stretched: bool = False,
        attention: AttentionTrial | None = None,
    ) -> Tensor:
        """Returns the (3, L, H) states before the output layer.

        Args:
            ids: (3, L) token ids.
            row: whether the sequences run in one row.
            stretched: whether the position ids after the common prefix are doubled.
            attention: tests the attention of each layer during this forward pass.
        """
        device, where = self._inputs["input_ids"].device, torch.ones_like(ids, dtype=torch.bool)
        arguments = self._inputs | {
            "input_ids": ids.to(device),
            "attention_mask": where.long().to(device),
        }
        order = None
        if row:
            where, arguments, order = pack(where, arguments, where, self._groups, self._rules)
        if stretched:  # positions after the first `_common` ones of each sequence
            places = arguments["position_ids"]
            arguments["position_ids"] = torch.where(places < self._common, places, 2 * places)
        if attention:
            arguments[ARGUMENT] = attention
        found, _ = forward_calling(
            self._model, self._layer, where, lambda rows: rows, arguments, instead=True
        )
        if found is None:
            raise RuntimeError("its output layer is not called, as in a graph compiled before")
        states: Tensor = in_order(found, order).unflatten(0, ids.shape)
        return states

    def of_values(self) -> SharedPrefixSupport:
        """Judges the states in the common row: which bits must change, which must not, and how far
        the values are from those of each sequence alone."""
        rounded = RoundedEmbeddings(unwrapped(self._model))
        attention = AttentionTrial(self._groups, [self._ids.shape[1]] * 3)
        alone = self._read(self._ids, attention=attention)
        with rounded:
            off = changed(self._read(self._ids), alone).flatten()
        rounding = rounding_of(self._model, rounded.dtypes, alone.device)
        tolerance = Tolerance(unwrapped(self._model), rounding, [off])

        row = self._read(self._ids, row=True)
        neighbours = self._read(self._neighbours, row=True)
        second = self._read(self._second, row=True)
        beginning = self._read(self._beginning, row=True)
        stretched = self._read(self._ids, row=True, stretched=True)

        others = slice(0, 3, 2)
        leak = max(_largest(row[1], neighbours[1]), _largest(row[others], second[others]))
        noise = 0.0
        if leak or is_sharded(self._model):
            # Effects of other rows of a batch, such as the load of experts, and random effects
            # occur also if each sequence has a row of its own. They are measured here.
            beside = [self._read(ids) for ids in (self._neighbours, self._second)]
            noise = max(
                _largest(alone[1], beside[0][1]), _largest(alone[others], beside[1][others])
            )
        after = self._common
        read = {
            "its layers do not call the attention function that knows where sequences begin": (
                len(attention.windows) > 0
            ),
            "all tokens that it was tried on are the same": bool(
                (self._ids[0] != self._neighbours[0]).any()
            ),
            "the common beginning is not read": self._rules.each_once
            or _largest(row[1, after:], beginning[1, after:]) > 0,
            "its layers do not read the positions that they are given": all(
                _largest(row[i, after + 1 :], stretched[i, after + 1 :]) > 0 for i in range(3)
            ),
        }
        why = next((why for why, holds in read.items() if not holds), "")
        least = 2 * max(rounding, 2.0**-16)
        output, slope, passed = map(_worst, (attention.output, attention.slope, attention.leak))
        why = (
            why
            or _beyond("other tokens in one sequence change another one", leak, 4 * noise)
            or _beyond("attention differs from that alone", output, least)
            or _beyond("attention's gradient differs from that alone", slope, 2 * least)
            or _beyond("attention's gradient passes to another sequence", passed, 0)
            or _beyond(
                "the states are not those of each alone",
                tolerance.of(changed(row, alone).flatten()),
                tolerance.allowed,
            )
        )
        told = [window for window in attention.windows if window]
        config = unwrapped(self._model).config.get_text_config()
        return SharedPrefixSupport(not why, told == windows_of(config), self._rules.each_once, why)


def _worst(found: Sequence[Tensor]) -> float:
    """Returns the largest of some scalars, which may be on different devices; NaN if one is NaN."""
    return float(torch.stack([one.cpu() for one in found]).max()) if found else 0.0


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.to(one.device).float()).abs().max())


def _beyond(what: str, found: float, allowed: float) -> str:
    """Describes a difference that is larger than allowed; returns an empty string for others."""
    return "" if found <= allowed else f"{what}: by {found:.2g}, where {allowed:.2g} is allowed"


def in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
