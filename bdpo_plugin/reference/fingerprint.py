"""Identifies a reference model by its content: its weights, its configuration and everything that
computes with them. The scorer uses it to find stored scores of the same reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from torch import Tensor, nn

from bdpo_plugin.reference.callables import package_of
from bdpo_plugin.reference.digests import Words, tensor_digest
from bdpo_plugin.reference.fingerprint_inputs import computation
from bdpo_plugin.reference.scoring import VERSION
from bdpo_plugin.settings import BDPOError

#: Used in place of an adapter's name: the model with its adapters in their current state.
AS_IT_IS = "*"


#: Settings of PEFT adapters that do not affect a forward pass in evaluation mode, if the matrices
#: and the scaling are the same.
_ADAPTER_NOTES = {
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode"),
    *("peft_version", "peft_type", "lora_dropout", "init_lora_weights", "runtime_config"),
}


class UnreadableReference(BDPOError):
    """Raised if a part of a reference cannot be read, so that the reference cannot be
    identified."""


class Fingerprint(NamedTuple):
    """Identifies a reference. Its log-probabilities depend on both digests.

    Attributes:
        weights: hex digest of the content of its weights.
        computation: hex digest of everything that computes with them, including the releases of
            packages.
    """

    weights: str
    computation: str


def model_fingerprint(model: Any, *, adapter: str | None = None, compute: str = "") -> Fingerprint:
    """Computes the fingerprint of everything that a reference's log-probabilities depend on.

    It reads all weights (the hash is linear in them, so a 7B model takes seconds), but not their
    names. So the base model under a LoRA adapter of any rank, seed or target has the same
    fingerprint as the same weights loaded as a separate model. The fingerprint also covers
    everything that :mod:`~bdpo_plugin.reference.fingerprint_inputs` describes, the settings of an
    adapter that is part of the reference, and the
    :data:`~bdpo_plugin.reference.scoring.VERSION` of the scoring.

    Args:
        adapter: the PEFT adapter that is part of the reference; None: all adapters are off;
            :data:`AS_IT_IS`: the active adapters.
        compute: a description of autocast, if it is on.

    Raises:
        UnreadableReference: The values of a weight are not available (it is on the `meta` device)
            or cannot be read, or an attribute or a hook of a module cannot be described.
    """
    weights = hashlib.blake2b(digest_size=16)
    packages = set()
    for name, tensor in _reference_tensors(model, adapter):
        packages.add(package_of(type(tensor)))
        try:
            weights.update(tensor_digest(tensor))
        # An unknown tensor class may not support an operation; RuntimeError is also out of memory.
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UnreadableReference(
                f"The content of the reference's weight {name!r}, a {_kind(tensor)}, cannot be "
                f"read: {_first_line(error)}"
            ) from error
    if settings := _adapter_settings(model, adapter):
        packages.add("peft")
    try:
        words = Words().of([VERSION, compute, settings, computation(model, packages)])
    except TypeError as error:
        raise UnreadableReference(
            f"What computes in the reference is not known: {error}"
        ) from error
    computed = hashlib.blake2b(words.encode(), digest_size=16)
    return Fingerprint(weights.hexdigest(), computed.hexdigest())


def _adapter_settings(model: Any, adapter: str | None) -> list[Any]:
    """Returns the settings of the adapters that are part of the reference."""
    known = getattr(model, "peft_config", None)
    if not isinstance(known, dict) or adapter is None:
        return []
    names = [adapter]
    if adapter == AS_IT_IS:  # read from the layers: on models of transformers it is a method
        active = (getattr(module, "active_adapters", None) for module in model.modules())
        names = sorted({name for names in active if isinstance(names, list) for name in names})
    return [
        {k: v for k, v in known[name].to_dict().items() if k not in _ADAPTER_NOTES}
        for name in names
        if name in known
    ]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Computes the hex digest of a tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _reference_tensors(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of the reference; the names are used in messages only."""
    skipped: list[str] = []
    for name, module in model.named_modules():
        # modules added by PEFT: the layers of its adapters, and the trained copies of modules
        for attribute in (
            *getattr(module, "adapter_layer_names", ()),
            *getattr(module, "other_param_names", ()),
            "modules_to_save",
        ):
            if isinstance(getattr(module, attribute, None), nn.Module):
                skipped.append(f"{name}.{attribute}." if name else f"{attribute}.")
        active = [adapter] if adapter != AS_IT_IS else getattr(module, "active_adapters", [])
        if adapter == AS_IT_IS and getattr(module, "disable_adapters", False):
            active = []
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and any(name in scaling for name in active):
            strengths = [float(scaling[name]) for name in active if name in scaling]
            yield f"{name}.scaling", torch.tensor(strengths)
    skipped.append("prompt_encoder.")
    prefixes = tuple(skipped) if adapter != AS_IT_IS else ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if prefixes and name.startswith(prefixes) and adapter not in name.split("."):
            continue
        # under ZeRO-3: the shard of this rank
        yield name, getattr(tensor, "ds_tensor", _at_hand(model, name, tensor))
        yield from ((f"{name}'s scale", scale) for scale in _quantisation_scales(tensor))
    # 8-bit layers move the scale from their weight to their own state at its first use
    for name, module in model.named_modules():
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                yield f"{name}.SCB", scale
                break
        # HQQ stores scales and zero points in a dict of the layer
        yield from _in_dict(f"{name}.meta", getattr(module, "meta", None))


def _in_dict(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of a nested dict, sorted by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _in_dict(f"{name}.{key}", value[key])


def _at_hand(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor; loads its values if accelerate has offloaded it."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1) if tensor.is_meta else ():
        holder = model.get_submodule(".".join(path[:depth]))
        if has_offloaded_params(holder):
            with align_module_device(holder, torch.device("cpu")):
                whole: Tensor = getattr(model.get_submodule(".".join(path[:-1])), path[-1])
                return whole
    return tensor


def _quantisation_scales(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensors that dequantise a 4-bit weight."""
    state = getattr(tensor, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        for field in ("absmax", "offset", "code"):
            if isinstance(scale := getattr(part, field, None), Tensor):
                yield scale


def _kind(tensor: Tensor) -> str:
    kind = type(tensor).__name__
    return f"{kind} on {tensor.device}" if tensor.is_meta else f"{kind} of {tensor.dtype}"
