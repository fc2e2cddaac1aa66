"""A causal language model: where its output layer is, what follows it, what its rows may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, and so no random number drawn. Each module gets its own back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def keep_differentiable(model: nn.Module) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes packs a layer's 4-bit weights at its first use
    in evaluation mode: in place, with a rounding, and without a gradient ever after."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the weights (FSDP, ZeRO-3) and none can run it alone."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()) or any(
        hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()
    )


def unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that projects to the vocabulary, if the model tells."""
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model in it."""
    return unwrapped(model).config.get_text_config()


def rotary_limit(model: nn.Module) -> int | None:
    """Tokens beyond which the model's rotary embedding depends on the longest sequence of a batch;
    None where it does not (all but ``longrope`` and ``dynamic``)."""
    config = text_config(model)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # by type of layer, in some models
    for rope in found.values() if all(isinstance(v, dict) for v in found.values()) else [found]:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su", "dynamic"):
            name = "original_max_position_embeddings"
            return rope.get(name) or getattr(config, name, None) or config.max_position_embeddings
    return None


def logits_postprocessing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the architectures of transformers do to their logits after the output layer.

    :class:`~bdpo_plugin.model.reader.ResponseReader` finds out where this is not all, or
    wrong.
    """
    config = text_config(model)
    factor = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    if divisor := getattr(config, "logits_scaling", None):
        factor = 1 / divisor
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if factor == 1 else logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish
