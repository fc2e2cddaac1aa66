"""Facts about a causal language model: :class:`Traits` are read once, the rest at each call."""

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

#: Fields of a configuration whose layers look at a token's place in its row (Llama 4).
_PLACES = ("attention_chunk_size", "attn_temperature_tuning")

#: The tensors that a model's forward is given where a batch is text alone.
_USUAL = {"input_ids", "attention_mask"}


@dataclass(frozen=True)
class Traits:
    """What is constant of a causal language model: what its class and its configuration say.

    What a user, a host or an adapter may change between two calls is not here, but asked each
    time: the output layer itself (:func:`output_layer`; adapters replace it), whether the ranks
    share the weights (:func:`is_sharded`), and for packed rows the attention implementation, the
    active adapter, compilation, NEFTune, training mode and the router's loss (:func:`row_rules`).

    Attributes:
        vocabulary: entries that the output layer projects to.
        logit_factor, logit_cap: what the architectures of transformers do to their logits after
            the output layer: multiply them, then cap them softly (None: no cap). A trial finds
            out where this is not all, or wrong.
        attends_only: whether attention alone passes anything from one position to another.
        packable: whether position ids may tell its layers where a sequence begins.
        window: tokens of the longest sequence that every layer sees the whole of, where some see
            a part of what is before them alone.
        widest_row: tokens of the widest row that it has room for.
        rotary_limit: tokens beyond which its rotary embedding depends on the longest sequence of a
            batch; None where it does not (all but ``longrope`` and ``dynamic``).
        position_limit: tokens of the longest sequence that a model with a table of positions can
            read (GPT-2, OPT, GPT-J and others); None where there is no such table.
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
        """Read them, of a model of transformers, however wrapped."""
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
        """The model's logits, from what its output layer returned."""
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
    """0 where it has one and does not tell how long it is."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not window:
        return math.inf if kinds == {"full_attention"} else 0
    return window if isinstance(window, int) else 0


def windows_of(config: Any) -> list[int]:
    """How far each of the layers looks that sees a part of what is before it alone."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int):
        return []
    kinds = getattr(config, "layer_types", None)
    number = kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    return [window] * number


def _widest_row(config: Any) -> float:
    """No limit with rotary embeddings."""
    if any(hasattr(config, name) for name in ("rope_parameters", "rope_theta")):
        return math.inf
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else math.inf  # XLNet says -1


def _rotary_limit(config: Any) -> int | None:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # by type of layer, in some models
    for rope in found.values() if all(isinstance(v, dict) for v in found.values()) else [found]:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su", "dynamic"):
            name = "original_max_position_embeddings"
            limit: int | None = rope.get(name) or getattr(config, name, None)
            return limit or int(config.max_position_embeddings)
    return None


def _position_limit(model: Any, config: Any) -> int | None:
    """The table is told from the others by its length, which is what the configuration names."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or hasattr(config, "rope_parameters"):
        return None
    inputs = model.get_input_embeddings()
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's begins with two more rows
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not inputs
    ]
    tables += [len(buffer) for buffer in model.buffers() if buffer.dim() == 2]
    return length if length in tables else None


class RowRules(NamedTuple):
    """What row the sequences of one batch may be laid in.

    Attributes:
        widest: tokens that the row may have.
        longest: tokens that a sequence in it may have.
        each_once: whether every token has to be run exactly once, and no padding: a loss over the
            experts' load counts them.
    """

    widest: float
    longest: float
    each_once: bool


def row_rules(model: nn.Module, traits: Traits, inputs: dict[str, Any]) -> RowRules | str:
    """Whether the batch may be laid in a row at this call, and in which; else why not, in words.

    What a model's layers are is told in :mod:`~bdpo_plugin.model.layer_kinds`, and whether it
    keeps sequences apart is to be seen (:mod:`~bdpo_plugin.model.probe`). What a trial on a few
    tokens would not show is left out here: layers that look at a token's place in its row,
    adapters that begin at the last invocation in a row, and NEFTune, whose noise in training
    depends on the width of the batch.

    Args:
        inputs: of the model's forward.
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
        "its layers are not told their positions": not traits.packable,
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
    """A traced model does not look where the position ids begin again."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the weights (FSDP, ZeRO-3) and none can run it alone."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()) or any(
        hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()
    )


def unwrapped(model: Any) -> Any:
    """The model, adapters included, in what distributed training wraps it in."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _bare(model: nn.Module) -> Any:
    """The model of transformers, without its wrappers and its adapters' own."""
    bare = unwrapped(model)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that projects to the vocabulary, if the model tells."""
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    layer = find() if find else None
    return layer if isinstance(layer, nn.Module) else None


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
