"""What a model can do, tried on short sequences when it is met.

Whether its output layer can be run apart is seen from the model's own logits. Whether the
sequences of a row are kept apart is seen from bits: attention gives exactly no weight to what it
does not see, so that other tokens in the place of a neighbour change not one bit, in any dtype;
what they do change in rows of one sequence each (the load of a mixture's experts, kernels that are
not deterministic) is told apart by the same change there. And other tokens in the common
beginning, or other positions, must change some. A convolution, a state or a mask that was not read
shows at once. What is left is a comparison of values, by what rounding does to them.

B rows of T positions in a batch, L tokens in each sequence of a trial, V vocabulary entries, H
hidden size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdpo_plugin.model.attention_probe import AttentionTrial
from bdpo_plugin.model.head import forward_calling
from bdpo_plugin.model.padding import Padding, PaddingEffect, try_padding
from bdpo_plugin.model.rounding import RoundedEmbeddings, Tolerance, changed, rounding_of
from bdpo_plugin.model.shared_prefix import in_order, pack
from bdpo_plugin.model.traits import (
    RowRules,
    Traits,
    evaluation,
    is_sharded,
    row_rules,
    unwrapped,
    windows_of,
)
from bdpo_plugin.model.tree_attention import ARGUMENT, PrefixGroup

#: Tokens that a model's output layer is tried on.
_FEW = 32

#: Tokens of each of the three sequences; a quarter of them the first two have in common.
_LENGTH = 32

#: What a model may say that cannot read such rows, such as one that takes the mask of a row for
#: that of a batch.
_CANNOT = (ValueError, TypeError, IndexError, RuntimeError)


@dataclass(frozen=True)
class SharedPrefixSupport:
    """Whether batches of a model may be laid in a row in which a common beginning stands once.

    Attributes:
        shared: whether they may.
        windows: whether its layers tell attention how far they look, so that sequences may be
            longer than that.
        each_once: whether every token was run once, as :class:`RowRules` wanted.
        why: why they may not, in words.
    """

    shared: bool = False
    windows: bool = False
    each_once: bool = False
    why: str = ""


class Capabilities(NamedTuple):
    """What a model can do.

    Attributes:
        padding: what padding does to its numbers.
        chunked: its logits can be had from its output layer, a chunk of positions at a time.
        rows: whether its batches may be laid in a row.
    """

    padding: Padding
    chunked: bool = False
    rows: SharedPrefixSupport = SharedPrefixSupport()


def probe(
    model: nn.Module,
    layer: nn.Module | None,
    traits: Traits,
    inputs: dict[str, Any],
    ids: Tensor,
    mask: Tensor,
) -> Capabilities:
    """What a model can do; where its logits are not those of its output layer, little, and the
    user is told.

    The number of forward passes is the same in every rank: a sharded model needs it.

    Args:
        layer: its output layer, if it tells.
        inputs: of its forward, of some batch.
        ids, mask: the token ids and the attention mask of that batch, (B, T), on the CPU.
    """
    _keep_differentiable(model)
    longest = mask.sum(dim=1).argmax()
    with torch.no_grad(), evaluation(model):
        limit = min(traits.widest_row, traits.position_limit or math.inf)
        try:
            padding = try_padding(model, layer, inputs, ids[longest][mask[longest]], limit)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT as error:
            padding = Padding(*[PaddingEffect(unknown=_in_short(error))] * 2)
    if layer is None:
        return Capabilities(
            padding, rows=SharedPrefixSupport(why="it does not tell its output layer")
        )
    some = mask[0].nonzero().flatten()[:_FEW]
    one = {
        name: value[:1, some.to(value.device)]
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape
        else value
        for name, value in inputs.items()
    }
    few = torch.ones(1, len(some), dtype=torch.bool)
    with torch.no_grad(), evaluation(model):
        bare, outputs = forward_calling(model, layer, few, layer, one, instead=False)
        rules = row_rules(model, traits, inputs)
        if isinstance(rules, str):
            rows = SharedPrefixSupport(why=rules)
        else:
            rows = try_rows(model, layer, rules, inputs, ids[mask])
        if bare is not None:
            theirs = outputs.logits[0].float()
            mine = traits.postprocess_logits(bare.float()).to(theirs.device)
            # post-processing in float32 differs from the model's own by its dtype's rounding
            tolerance = max(2 * torch.finfo(bare.dtype).eps, 1e-4)
            if mine.shape == theirs.shape and bool(changed(mine, theirs).max() <= tolerance):
                return Capabilities(padding, True, rows)
    warnings.warn(
        f"bdpo-plugin does not reproduce the logits of {type(model).__name__} from its output "
        "layer, so the model projects all response positions of a batch at once: as correct, "
        "with more memory.",
        stacklevel=2,
    )
    return Capabilities(
        padding, rows=SharedPrefixSupport(why="its logits are not those of its output layer alone")
    )


def _keep_differentiable(model: nn.Module) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes packs a layer's 4-bit weights at its first use
    in evaluation mode: in place, with a rounding, and without a gradient ever after."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def try_rows(
    model: nn.Module,
    layer: nn.Module,
    rules: RowRules,
    inputs: dict[str, Any],
    tokens: Tensor,
) -> SharedPrefixSupport:
    """Whether batches of the model may be laid in a row; to be called without gradient.

    The number of forward passes is the same in every rank: a sharded model needs it.

    Args:
        layer: the model's output layer.
        rules: of that batch.
        inputs: of the model's forward, of some batch.
        tokens: (N,) token ids of that batch, that the sequences are made of.
    """
    try:
        return _Trial(model, layer, rules, inputs, tokens).of_values()
    except torch.OutOfMemoryError:
        raise
    except _CANNOT as error:
        return SharedPrefixSupport(why=_in_short(error))


class _Trial:
    """Three sequences of L tokens, the first two with a common beginning, in rows of their own and
    in one row in which that stands once."""

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
        # where the tokens are few, at least not in the same order
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
        """The states before the output layer, (3, L, H)."""
        device, where = self._inputs["input_ids"].device, torch.ones_like(ids, dtype=torch.bool)
        arguments = self._inputs | {
            "input_ids": ids.to(device),
            "attention_mask": where.long().to(device),
        }
        order = None
        if row:
            where, arguments, order = pack(where, arguments, where, self._groups, self._rules)
        if stretched:  # the positions of what follows a beginning, and of the last sequence
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
        """What the states say: bits that must change, bits that must not, and how far they are
        from those alone."""
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
            # What depends on other rows of a batch, such as the load of experts, or on chance, does
            # so in rows of their own as well.
            beside = [self._read(ids) for ids in (self._neighbours, self._second)]
            noise = max(
                _largest(alone[1], beside[0][1]), _largest(alone[others], beside[1][others])
            )
        after = self._common
        read = {
            "its layers do not call the attention that is told where sequences begin": (
                len(attention.windows) > 0
            ),
            "all tokens that it was tried on are the same": bool(
                (self._ids[0] != self._neighbours[0]).any()
            ),
            "the common beginning is not read": self._rules.each_once
            or _largest(row[1, after], beginning[1, after]) > 0,
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
    """The largest of scalars on any devices; NaN where one is."""
    return float(torch.stack([one.cpu() for one in found]).max()) if found else 0.0


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.to(one.device).float()).abs().max())


def _beyond(what: str, found: float, allowed: float) -> str:
    """What to say of a difference; nothing where it is allowed."""
    return "" if found <= allowed else f"{what}: by {found:.2g}, where {allowed:.2g} is allowed"


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
