"""Probes on short sequences how a model may be run; the response reader calls :func:`probe` the
first time that it reads a model.

The probe answers three questions:

- Can the output layer run by itself? The probe compares its result with the model's own logits.
- Do logits depend on padding? (:mod:`~bdpo_plugin.model.padding`)
- Can a batch run in one row? (:mod:`~bdpo_plugin.model.row_probe`)

Shapes: B rows of T positions in a batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdpo_plugin.model.head import forward_calling
from bdpo_plugin.model.padding import Padding, PaddingEffect, try_padding
from bdpo_plugin.model.rounding import changed
from bdpo_plugin.model.row_probe import CANNOT, SharedPrefixSupport, in_short, try_rows
from bdpo_plugin.model.traits import Traits, evaluation, row_rules

#: The number of tokens that the output layer is probed on.
_FEW = 32


class Capabilities(NamedTuple):
    """Results of the probe of a model.

    Attributes:
        padding: the effect of padding on its logits.
        chunked: whether its logits can be computed from its output layer, a chunk of positions at
            a time.
        rows: whether it can run a batch packed in one row.
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
    """Probes a model.

    Warns if its logits cannot be computed from its output layer. Such a model runs padded and
    projects all response positions of a batch at once.

    The number of forward passes is the same in every rank, as a sharded model requires.

    Args:
        model: a causal language model, in any wrapper.
        layer: its output layer, or None if the model does not name one.
        traits: the traits of the model.
        inputs: the arguments of the model's forward for some batch.
        ids: (B, T) the token ids of that batch, on the CPU.
        mask: (B, T) bool, its attention mask, on the CPU.
    """
    _keep_differentiable(model)
    longest = mask.sum(dim=1).argmax()
    with torch.no_grad(), evaluation(model):
        limit = min(traits.widest_row, traits.position_limit or math.inf)
        try:
            padding = try_padding(model, layer, inputs, ids[longest][mask[longest]], limit)
        except torch.OutOfMemoryError:
            raise
        except CANNOT as error:
            padding = Padding(*[PaddingEffect(unknown=in_short(error))] * 2)
    if layer is None:
        return Capabilities(padding, rows=SharedPrefixSupport(why="its output layer is not known"))
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
            # We post-process in float32, the model in its own dtype: the results differ by the
            # rounding of that dtype.
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
    """Prevents bitsandbytes from packing 4-bit weights for inference.

    On CPUs with AVX512-BF16 it packs the weights of a layer at the first use in evaluation mode. It
    does so in place and with rounding, and the layer has no gradient from then on.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
