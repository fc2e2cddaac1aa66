"""What a reference model is, by content: weights, configuration, compute dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Configuration entries that change no number of a forward pass.
_VOLATILE = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
}
_WIDTH = 4096
_BLOCK = 2**22

#: In the place of an adapter's name: the model with whatever adapters it has, as they are.
AS_IT_IS = "*"


def model_fingerprint(model: nn.Module, *, adapter: str | None = None, compute: str = "") -> str:
    """Hex digest of everything that a reference's log-probabilities depend on.

    All weights are read (a hash that is linear in them, so a 7B model takes seconds); names are
    not, so that the base model under a LoRA adapter of any rank, seed or target and the same
    weights loaded as a model of their own have one fingerprint.

    Args:
        model: the model, with or without PEFT adapters.
        adapter: the PEFT adapter that is part of the reference; None: all adapters off;
            :data:`AS_IT_IS`: whatever is active.
        compute: the dtype of autocast, if any.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict()
    kept = {k: v for k, v in config.items() if k not in _VOLATILE}
    digest.update(json.dumps([kept, compute], sort_keys=True, default=str).encode())
    for tensor in _reference_tensors(model, adapter):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_tensor_digest(tensor))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _reference_tensors(model: nn.Module, adapter: str | None) -> Iterator[Tensor]:
    skipped: list[str] = []
    for name, module in model.named_modules():
        # what PEFT adds: the layers of its adapters, and the trained copies of whole modules
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
            yield torch.tensor([float(scaling[name]) for name in active if name in scaling])
    skipped.append("prompt_encoder.")
    prefixes = tuple(skipped) if adapter != AS_IT_IS else ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if prefixes and name.startswith(prefixes) and adapter not in name.split("."):
            continue
        yield getattr(tensor, "ds_tensor", tensor).detach()  # the shard of this rank under ZeRO-3
        yield from _quantisation_scales(tensor)
    # 8-bit layers move their weight's scale to themselves at its first use
    for module in model.modules():
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                yield scale
                break


def _quantisation_scales(tensor: Tensor) -> Iterator[Tensor]:
    """What turns the codes of a 4-bit weight into numbers."""
    state = getattr(tensor, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        for field in ("absmax", "offset", "code"):
            if isinstance(scale := getattr(part, field, None), Tensor):
                yield scale


def _tensor_digest(tensor: Tensor) -> bytes:
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 4:
        raw = raw.clone()
    whole = raw.numel() // 4 * 4
    digest = hashlib.blake2b(raw[whole:].cpu().numpy().tobytes(), digest_size=16)
    # 32-bit words in 64-bit sums, so that the highest bit of a word counts as the others do
    words = raw[:whole].view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (_WIDTH,), generator=generator) | 1
    factors = factors.to(tensor.device)
    for block in words.split(_BLOCK):
        full = block.numel() // _WIDTH * _WIDTH
        # wraps around, which is what a hash wants
        rows = (block[:full].view(-1, _WIDTH) * factors).sum(dim=1)
        rest = (block[full:] * factors[: block.numel() - full]).sum()
        digest.update(torch.cat([rows, rest[None]]).cpu().numpy().tobytes())
    return digest.digest()
