"""What a reference model is, by content: weights, configuration, compute dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bdpo_plugin.settings import BDPOError

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
#: What a tensor that is not laid out in full consists of, by layout.
_PARTS = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}

#: In the place of an adapter's name: the model with whatever adapters it has, as they are.
AS_IT_IS = "*"


class UnreadableWeights(BDPOError):
    """A weight whose content cannot be read, so that nothing can say which reference this is."""


def model_fingerprint(model: Any, *, adapter: str | None = None, compute: str = "") -> str:
    """Hex digest of everything that a reference's log-probabilities depend on.

    All weights are read (a hash that is linear in them, so a 7B model takes seconds); names are
    not, so that the base model under a LoRA adapter of any rank, seed or target and the same
    weights loaded as a model of their own have one fingerprint.

    Args:
        model: the model, with or without PEFT adapters.
        adapter: the PEFT adapter that is part of the reference; None: all adapters off;
            :data:`AS_IT_IS`: whatever is active.
        compute: the dtype of autocast, if any.

    Raises:
        UnreadableWeights: a weight is not here (on the `meta` device), or of a kind that has no
            content that can be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict()
    kept = {k: v for k, v in config.items() if k not in _VOLATILE}
    digest.update(json.dumps([kept, compute], sort_keys=True, default=str).encode())
    for name, tensor in _reference_tensors(model, adapter):
        try:
            digest.update(_tensor_digest(tensor))
        # What a kind of tensor that we do not know does not know itself; also out of memory.
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UnreadableWeights(
                f"The content of the reference's weight {name!r}, a {_kind(tensor)}, cannot be "
                f"read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _reference_tensors(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors, by name; the names are for messages alone."""
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
            strengths = [float(scaling[name]) for name in active if name in scaling]
            yield f"{name}.scaling", torch.tensor(strengths)
    skipped.append("prompt_encoder.")
    prefixes = tuple(skipped) if adapter != AS_IT_IS else ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if prefixes and name.startswith(prefixes) and adapter not in name.split("."):
            continue
        # under ZeRO-3 the shard of this rank
        yield name, getattr(tensor, "ds_tensor", _at_hand(model, name, tensor))
        yield from ((f"{name}'s scale", scale) for scale in _quantisation_scales(tensor))
    # 8-bit layers move their weight's scale to themselves at its first use
    for name, module in model.named_modules():
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                yield f"{name}.SCB", scale
                break
        # HQQ keeps scales and zero points in a dict of the layer
        yield from _in_dict(f"{name}.meta", getattr(module, "meta", None))


def _in_dict(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested dict, in the order of their names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _in_dict(f"{name}.{key}", value[key])


def _at_hand(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor; if accelerate has offloaded it, with its values."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1) if tensor.is_meta else ():
        holder = model.get_submodule(".".join(path[:depth]))
        if has_offloaded_params(holder):
            with align_module_device(holder, torch.device("cpu")):
                whole: Tensor = getattr(model.get_submodule(".".join(path[:-1])), path[-1])
                return whole
    return tensor


def _quantisation_scales(tensor: Tensor) -> Iterator[Tensor]:
    """What turns the codes of a 4-bit weight into numbers."""
    state = getattr(tensor, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        for field in ("absmax", "offset", "code"):
            if isinstance(scale := getattr(part, field, None), Tensor):
                yield scale


def _kind(tensor: Tensor) -> str:
    kind = type(tensor).__name__
    return f"{kind} on {tensor.device}" if tensor.is_meta else f"{kind} of {tensor.dtype}"


def _tensor_digest(tensor: Tensor) -> bytes:
    """Of a tensor's shape, dtype and values; of one that is made of others, of these and of what
    says how they are put together.

    Raises:
        RuntimeError, TypeError and others: the values cannot be read.
    """
    kind, notes = type(tensor), {}
    if kind.__module__.partition(".")[0] not in ("torch", "bitsandbytes"):
        notes = vars(tensor)
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    words: tuple[Any, ...] = ()
    parts: list[Tensor] = []
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        words = (type(tensor).__qualname__, names, context)
        parts = [getattr(tensor, name) for name in names]
    elif tensor.layout in _PARTS:
        words = (tensor.layout,)
        tensor = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
        parts = [getattr(tensor, name)() for name in _PARTS[tensor.layout]]
    elif tensor.is_quantized:
        raise TypeError("it is of PyTorch's old quantised dtypes")
    else:
        # what a kind of tensor of somebody else's has beside its bytes may decide what they mean
        if notes:
            words = (
                kind.__qualname__,
                sorted((k, v) for k, v in notes.items() if not isinstance(v, Tensor)),
            )
            parts = [value for _, value in sorted(notes.items()) if isinstance(value, Tensor)]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        digest.update(_bytes_digest(tensor.resolve_neg().contiguous().view(-1).view(torch.uint8)))
    if words:
        digest.update(_in_words(words).encode())
    for part in parts:
        digest.update(_tensor_digest(part))
    return digest.digest()


def _in_words(value: Any) -> str:
    """What somebody else's tensor is put together by, the same in every process.

    Raises:
        TypeError: it depends on an object that shows nothing but its address.
    """
    if isinstance(value, dict):
        value = sorted(value.items())
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_in_words, value))})"
    words = repr(value)
    if callable(value) and "<" not in (name := getattr(value, "__qualname__", "<")):
        words = f"{value.__module__}.{name}"
    if " at 0x" in words:
        raise TypeError(f"it depends on {words}, which shows no content")
    return words


def _bytes_digest(raw: Tensor) -> bytes:
    if raw.is_meta:
        raise TypeError("its values are not here")
    if raw.numel() and not raw.data_ptr():  # made of others, and does not say of which
        raise TypeError("it has no bytes of its own")
    if raw.storage_offset() % 4:
        raw = raw.clone()
    whole = raw.numel() // 4 * 4
    digest = hashlib.blake2b(raw[whole:].cpu().numpy().tobytes(), digest_size=16)
    # 32-bit words in 64-bit sums, so that the highest bit of a word counts as the others do
    words = raw[:whole].view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (_WIDTH,), generator=generator) | 1
    factors = factors.to(raw.device)
    for block in words.split(_BLOCK):
        full = block.numel() // _WIDTH * _WIDTH
        # wraps around, which is what a hash wants
        rows = (block[:full].view(-1, _WIDTH) * factors).sum(dim=1)
        rest = (block[full:] * factors[: block.numel() - full]).sum()
        digest.update(torch.cat([rows, rest[None]]).cpu().numpy().tobytes())
    return digest.digest()
