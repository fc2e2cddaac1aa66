"""Reads facts about a causal language model. :class:`Traits` holds those that never change; the
functions below return the others at each call. The response reader and the probe use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdpo_plugin.model.layer_kinds import attends_only
from bdpo_plugin.model.tree_attention import takes_tree

#: Fields of a configuration whose layers depend on a token's index in its row (Llama 4).
_PLACES = ("attention_chunk_size", "attn_temperature_tuning")

#: The tensors that a model's forward takes if a batch has only text.
_USUAL = {"input_ids", "attention_mask"}


@dataclass(frozen=True)
class Traits:
    """Constant facts about a causal language model, from its class and its configuration.

    Facts that a user, a host or an adapter may change between two calls are not stored here, but
    read each time: the output layer (:func:`output_layer`; adapters replace it), whether the
    weights are sharded over the ranks (:func:`is_sharded`), and for packed rows the attention
    implementation, the active adapter, compilation, NEFTune, training mode and the router's loss
    (:func:`row_rules`).

    Attributes:
        vocabulary: the number of entries that the output layer projects to.
        logit_factor: the factor by which the model multiplies its logits after the output layer.
        logit_cap: the soft cap that it applies after that (None: no cap). The probe finds models
            whose post-processing differs from these two.
        attends_only: whether only attention passes information between positions.
        packable: whether the model takes position ids, and no layer depends on a token's index in
            its row.
        window: the longest sequence, in tokens, that every layer sees as a whole; infinite without
            a sliding window.
        widest_row: the most tokens that a row may have.
        rotary_limit: the number of tokens beyond which its rotary embedding depends on the longest
            sequence of a batch; None if it never does (all but ``longrope`` and ``dynamic``).
        position_limit: the longest sequence, in tokens, that a model with a table of positions can
            read (GPT-2, OPT, GPT-J and others); None if it has no such table.
    """

    vocabulary: int
    logit_factor: float
    logit_cap: float | None
    attends_only: bool
    packable: bool
    window: float
    widest_row: float
    rotary_limit: int | None
    position_limit: int | None

    @classmethod
    def of(cls, model: nn.Module) -> Traits:
        """Reads the traits of a model of transformers, in any wrapper."""
        bare = _bare(model)
        config = bare.config.get_text_config()
        return cls(
            vocabulary=config.vocab_size,
            logit_factor=_logit_factor(config),
            logit_cap=getattr(config, "final_logit_softcapping", None),
            attends_only=attends_only(bare, config),
            packable="position_ids" in signature(bare.forward).parameters
            and not any(getattr(config, name, None) for name in _PLACES),
            window=_window(config),
            widest_row=_widest_row(config),
            rotary_limit=_rotary_limit(config),
            position_limit=_position_limit(bare, config),
        )

    def postprocess_logits(self, logits: Tensor) -> Tensor:
        """Computes the model's logits from the result of its output layer."""
        logits = logits if self.logit_factor == 1 else logits * self.logit_factor
        cap = self.logit_cap
        return torch.tanh(logits / cap) * cap if cap else logits


def _logit_factor(config: Any) -> float:
    if divisor := getattr(config, "logits_scaling", None):
        return float(1 / divisor)
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    factors = (getattr(config, name, None) for name in names)
    return next((factor for factor in factors if factor is not None), 1.0)


def _window(config: Any) -> float:
    """Returns :attr:`Traits.window`; 0 if there is a window of unknown length."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not window:
        return math.inf if kinds == {"full_attention"} else 0
    return window if isinstance(window, int) else 0


def windows_of(config: Any) -> list[int]:
    """Returns the window, in tokens, of each layer with sliding-window attention."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int):
        return []
    kinds = getattr(config, "layer_types", None)
    number = kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    return [window] * number


def _widest_row(config: Any) -> float:
    """Returns :attr:`Traits.widest_row`; rotary embeddings set no limit."""
    if any(hasattr(config, name) for name in ("rope_parameters", "rope_theta")):
        return math.inf
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else math.inf  # XLNet says -1


def _rotary_limit(config: Any) -> int | None:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # some models have one entry for each type of layer
    for rope in found.values() if all(isinstance(v, dict) for v in found.values()) else [found]:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su", "dynamic"):
            name = "original_max_position_embeddings"
            limit: int | None = rope.get(name) or getattr(config, name, None)
            return limit or int(config.max_position_embeddings)
    return None


def _position_limit(model: Any, config: Any) -> int | None:
    """Returns :attr:`Traits.position_limit`. The table of positions is recognised by its length,
    which the configuration names."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or hasattr(config, "rope_parameters"):
        return None
    inputs = model.get_input_embeddings()
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's table has two rows more
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not inputs
    ]
    tables += [len(buffer) for buffer in model.buffers() if buffer.dim() == 2]
    return length if length in tables else None


class RowRules(NamedTuple):
    """Limits on the row that the sequences of one batch may be packed in.

    Attributes:
        widest: the most tokens that the row may have.
        longest: the most tokens that a sequence in it may have.
        each_once: whether every token must run exactly once, and no padding, because a loss over
            the load of the experts counts the tokens.
    """

    widest: float
    longest: float
    each_once: bool


def row_rules(model: nn.Module, traits: Traits, inputs: dict[str, Any]) -> RowRules | str:
    """Returns the limits on the row of a batch at this call, or the reason why it must keep its
    padding.

    The kinds of the layers are judged in :mod:`~bdpo_plugin.model.layer_kinds`, and
    :mod:`~bdpo_plugin.model.probe` tests whether sequences in a row stay independent. This function
    excludes what a probe on a few tokens would not show: layers that depend on a token's index in
    its row, adapters that begin at the last invocation in a row, and NEFTune, whose noise in
    training depends on the width of the batch.

    Args:
        model: the model, in any wrapper.
        traits: the traits of the model.
        inputs: the arguments of the model's forward.
    """
    bare, with_adapter = _bare(model), unwrapped(model)
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    adapter = getattr(with_adapter, "active_peft_config", None)
    config = bare.config.get_text_config()
    attention = str(getattr(config, "_attn_implementation", ""))
    routed = getattr(config, "output_router_logits", False)
    each_once = bool(inputs.get("output_router_logits", routed))
    refusals = {
        "not all that passes between its positions is known to be attention": not (
            traits.attends_only
        ),
        f"its attention ({attention}) takes no common beginning": not takes_tree(attention),
        "its layers do not get their positions": not traits.packable,
        f"the host gives it {', '.join(sorted(tensors - _USUAL))} as well": bool(tensors - _USUAL),
        "it is given no attention mask": bool(_USUAL - tensors),
        "its adapter learns a prompt": getattr(adapter, "is_prompt_learning", False),
        "its adapter begins at certain tokens": getattr(adapter, "alora_invocation_tokens", None),
        "NEFTune's noise depends on the width of a batch": model.training
        and getattr(bare.get_input_embeddings(), "neftune_noise_alpha", None),
        "a loss counts the tokens of its mask, of which a window makes another one": each_once
        and traits.window < math.inf,
        "it is compiled": _compiled(model) or _compiled(with_adapter),
    }
    if why := next((why for why, holds in refusals.items() if holds), None):
        return why
    return RowRules(widest=traits.widest_row, longest=traits.window, each_once=each_once)


def _compiled(model: nn.Module) -> bool:
    """Whether the model is compiled: a traced model does not check where position ids restart."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of the weights (FSDP, ZeRO-3), so that no rank can run
    the model alone."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()) or any(
        hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()
    )


def unwrapped(model: Any) -> Any:
    """Returns the model without the wrappers of distributed training, but with its adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _bare(model: nn.Module) -> Any:
    """Returns the model of transformers, without the wrappers of distributed training and PEFT."""
    bare = unwrapped(model)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def output_layer(model: nn.Module) -> nn.Module | None:
    """Returns the layer that projects to the vocabulary; None if the model does not name one."""
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    layer = find() if find else None
    return layer if isinstance(layer, nn.Module) else None


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, without dropout and so without drawing random numbers; on
    exit restores the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
