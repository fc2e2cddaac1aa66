"""The sequences of a batch one after another in a single row, not each padded to the longest.

The models of transformers keep the sequences of such a row apart by position ids that begin
again, with every attention implementation: what varlen kernels do at no cost, and others by a
mask as large as the row's length squared.

Shapes: B rows, T positions, W tokens of all rows together.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from bdpo_plugin.reference.output_layer import text_config, unwrapped


def packable(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a packed row may be tried on the model: whether it is kept apart is to be seen."""
    outer = unwrapped(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    return (
        tensors == {"input_ids", "attention_mask"}
        and "position_ids" in signature(inner.forward).parameters
        and not getattr(getattr(outer, "active_peft_config", None), "is_prompt_learning", False)
        and not _compiled(model, outer)
    )


def _compiled(*models: nn.Module) -> bool:
    """A traced model does not look where the position ids begin again."""
    return any(
        hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
        for model in models
    )


def packing_pays(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a packed row is possible and costs less than the padded (B, T) batch.

    A layer of hidden size H costs about 24 H^2 operations a token, and 4 H more for each token
    that it is compared with in attention.
    """
    if not packable(model, inputs):
        return False
    config = text_config(model)
    rows, width = inputs["attention_mask"].shape
    tokens = int(inputs["attention_mask"].sum())
    if tokens == rows * width:
        return False
    attention = str(getattr(config, "_attn_implementation", ""))
    if "flash" in attention or "flex" in attention:
        return True
    linear = 6 * config.hidden_size
    return tokens * (linear + tokens) < rows * width * (linear + width)


def pack(positions: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A (B, T) batch and positions in it as one row, both (1, W)."""
    mask = inputs["attention_mask"]
    real = mask.bool()
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return positions[real][None], rest | {
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": (mask.cumsum(dim=1) - 1)[real][None],
        "use_cache": False,  # a model with a cache to fill takes the row for one sequence
    }
