"""Describes everything that computes with the weights of a reference model, as text that is the
same in every process. :mod:`~bdpo_plugin.reference.fingerprint` uses its digest.

The log-probabilities of a model depend on more than its weights and configuration: also on the
attention implementation, fake quantisation, replaced layers and patched functions. Each of these is
written as text here.

The description leaves out: adapters that are switched off, and the layers in which PEFT wraps
others; addresses and paths; training mode, gradient checkpointing, compilation and placement on
devices, which change results by rounding only. For functions outside of a model's own file it
includes their code, but not the code of the functions that they call; the release of their package
stands for that. :mod:`~bdpo_plugin.reference.verification` guards against what is missed here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from bdpo_plugin.model.traits import unwrapped
from bdpo_plugin.redact import digest_of
from bdpo_plugin.reference.callables import (
    file_of,
    functions_of,
    names_in,
    package_of,
    replaced_forward,
)
from bdpo_plugin.reference.digests import Words

#: Entries of a configuration, at any depth, that do not affect a forward pass.
_VOLATILE = {
    *("_name_or_path", "_commit_hash", "architectures", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"),
}

#: Attributes of a configuration that name an implementation and are not in its dictionary.
_ATTENTION = "_attn_implementation"
_IMPLEMENTATIONS = (_ATTENTION, "_experts_implementation")

#: Attributes of modules that do not affect a forward pass in evaluation mode: those of PyTorch,
#: those that are read in another way, and notes of hosts and libraries about loading, placement
#: and training.
_NOTES = {
    *vars(nn.Module()),
    *("config", "forward", "_old_forward", "_original_forward", "_hf_hook", "_compiled_call_impl"),
    *("name_or_path", "warnings_issued", "generation_config", "model_tags", "peft_config"),
    *("hf_quantizer", "hf_device_map", "_hf_peft_config_loaded", "_is_hf_initialized"),
    "_is_accelerate_prepared",
    *("gradient_checkpointing", "gradient_checkpointing_enable", "gradient_checkpointing_disable"),
    *("enable_input_require_grads", "generate", "save_pretrained", "push_to_hub"),
    *("add_model_tags", "get_input_embeddings", "get_output_embeddings", "loss_type"),
    *("is_parallelizable", "model_parallel", "supports_gradient_checkpointing", "_use_kernels"),
    *("all_tied_weights_keys", "_tied_weights_keys", "_compiled", "_is_torch_compile"),
    # state that bitsandbytes keeps for a layer's weight, and sets at the first use
    *("state", "quant_state", "compute_type_is_set", "support_avx512bf16_for_cpu"),
}
_NOTES_BEGIN = ("ds_", "fp32_weights", "neftune")

#: Matches names of attributes that a forward pass leaves behind (states of recurrent layers).
_KEPT = re.compile("cache|_states?$")

#: The types of the private attributes that are described; others are left out.
_PLAIN = (bool, int, float, str, FunctionType, MethodType)

#: Packages whose hooks on forwards move tensors, gather shards, record outputs or let gradients
#: flow, and do not affect the results. (NEFTune's hook, in transformers, adds noise in training
#: mode only.)
_HARMLESS_HOOKS = ("accelerate", "deepspeed", "transformers", "trl", "peft", "bdpo_plugin")
_HARMLESS_PARTS = ("torch.distributed", "torch.utils", "torch._")
_PLACING = {"AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook"}

#: The base module of all models of transformers, with loading, saving and losses.
_BASE_FILE = "transformers.modeling_utils"


def computation(root: nn.Module, packages: Iterable[str] = ()) -> str:
    """Digest of everything that computes with a model's weights, without its adapters.

    Args:
        root: a model of transformers, or one whose `config` has `to_dict`; in any wrapper.

    Raises:
        TypeError: A part of the model cannot be described.
    """
    words = _Computing()
    lines = [*_of_modules(words, _bare(root)), *_arithmetic()]
    for package in sorted({"torch", "transformers", *packages, *words.packages}):
        if release := _release(package):
            lines.append(f"{package} {release}")
    return digest_of("\n".join(lines))


def without_notes(config: Any) -> Any:
    """Returns the dictionary of a configuration without the entries of :data:`_VOLATILE`."""
    if isinstance(config, dict):
        return {k: without_notes(v) for k, v in config.items() if k not in _VOLATILE}
    return [without_notes(v) for v in config] if isinstance(config, (list, tuple)) else config


def _arithmetic() -> list[str]:
    """Describes the settings of PyTorch that decide the precision of matrix products."""
    cuda = torch.backends.cuda.matmul
    sums = (
        cuda.allow_fp16_reduced_precision_reduction,
        cuda.allow_bf16_reduced_precision_reduction,
    )
    return [
        f"float32 by {torch.get_float32_matmul_precision()}",
        f"TF32 {torch.backends.cudnn.allow_tf32}",
        f"reduced sums {sums}",
    ]


def _release(package: str) -> str | None:
    found = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bare(model: Any) -> nn.Module:
    """Returns a model without the wrappers of distributed training, compilation and PEFT."""
    bare = unwrapped(getattr(unwrapped(model), "_orig_mod", model))
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    found: nn.Module = getattr(bare, "_orig_mod", bare)
    return found


def _layer(module: nn.Module) -> nn.Module:
    """Returns the layer that PEFT or a compiler has wrapped, or the module itself."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if hasattr(module, "adapter_layer_names"):
            inner = getattr(module, "original_module", None)
            inner = getattr(module, "base_layer", None) if inner is None else inner
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _of_modules(words: _Computing, root: nn.Module) -> Iterator[str]:
    """Yields one line for each module of a model, in depth-first order."""
    met: set[int] = set()
    waiting = [(0, root)]
    while waiting:
        depth, module = waiting.pop()
        module = _layer(module)
        if id(module) in met:
            yield f"{depth} again a {type(module).__qualname__}"
            continue
        met.add(id(module))
        try:
            yield f"{depth} {words.of_module(module)}"
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"of its {type(module).__qualname__} {error}") from error
        children = [child for child in module._modules.values() if child is not None]
        waiting += [(depth + 1, child) for child in reversed(children)]


class _Computing(Words):
    """Describes modules as text.

    Attributes:
        packages: the packages that define the described modules and the functions that replace
            their forwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.packages: set[str] = set()

    def of_module(self, module: nn.Module) -> str:
        """Describes a module by its class, its configuration, a function that replaces its forward,
        its hooks and its attributes; without its tensors and children.

        Raises:
            TypeError: An attribute cannot be described.
        """
        parts = [self.once(type(module), self._of_class)]
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            parts.append(self.once(config, self._of_config))
        if (forward := replaced_forward(module)) is not None:
            self.packages |= {package_of(f) for f in functions_of(forward)}
            parts.append(f"forward {self.of(forward)} {self._reached(forward, type(module))}")
        parts += [f"hook {self.of(hook)}" for hook in _hooks(module)]
        parts.append(f"threshold {getattr(getattr(module, 'state', None), 'threshold', None)}")
        for name, value in sorted(vars(module).items()):
            if name in _NOTES or name.startswith(_NOTES_BEGIN) or _KEPT.search(name):
                continue
            if name.startswith("_") and not isinstance(value, _PLAIN):
                continue
            try:
                parts.append(f"{name}={self.of(value)}")
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(f"{name!r} cannot be read: {error}") from error
        return " ".join(parts)

    def _of_class(self, cls: type) -> str:
        """Describes a class, with the code that its forward reaches."""
        package = package_of(cls)
        self.packages.add(package)
        forward = getattr(cls, "forward", None)
        if forward is None or (package == "torch" and package_of(forward) == "torch"):
            return cls.__qualname__
        return f"{cls.__qualname__} {self._reached(forward, cls)}"

    def _reached(self, start: Any, cls: type) -> str:
        """Digest of the code that a function of a class runs.

        It follows names from function to function within the class and within the files that define
        the class and the function. Of functions in other files it includes their own code only, of
        PyTorch's only those that another package has replaced.
        """
        files = {base.__module__ for base in cls.__mro__ if package_of(base) != "torch"}
        files |= {file_of(function) for function in functions_of(start)}
        files.discard(_BASE_FILE)
        found: set[str] = set()
        met: set[int] = set()
        waiting = [start]
        strict, self.strict = self.strict, False
        while waiting:
            value = waiting.pop()
            found.add(self.of(value))
            for function in functions_of(value):
                if id(function) in met or file_of(function) not in files:
                    continue
                met.add(id(function))
                for name in names_in(function.__code__):
                    if name not in function.__globals__:
                        waiting += functions_of(getattr_static(cls, name, None))
                        continue
                    other = function.__globals__[name]
                    if isinstance(other, (bool, int, float)):
                        found.add(f"{name}={other!r}")
                    elif isinstance(other, ModuleType):
                        found |= self._put_into(other, function.__code__)
                    elif not isinstance(other, type):
                        waiting += functions_of(other)
        self.strict = strict
        return digest_of("\n".join(sorted(found)))

    def _put_into(self, library: ModuleType, code: CodeType) -> set[str]:
        """Describes the functions that some code looks up in a module of PyTorch and that another
        package has put there."""
        if not library.__name__.startswith("torch"):
            return set()
        values = {name: vars(library).get(name) for name in names_in(code)}
        return {
            f"{name} {self.of(value)}"
            for name, value in values.items()
            if isinstance(value, FunctionType) and package_of(value) != "torch"
        }

    def _of_config(self, config: Any) -> str:
        """Describes a configuration, its sub-configurations and the functions that they name."""
        parts = [self.of(without_notes(config.to_dict()))]
        known = [config, *(vars(config).get(name) for name in getattr(config, "sub_configs", ()))]
        for part in known:
            for name in _IMPLEMENTATIONS:
                if isinstance(found := getattr(part, name, None), str):
                    parts.append(f"{name} {found}")
                    parts += self._of_attention(found) if name == _ATTENTION else []
        return " ".join(parts)

    def _of_attention(self, name: str) -> list[str]:
        """Describes the functions registered under the name of an attention implementation."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if "flash" in name:
            self.packages.add("flash_attn")
        tables: tuple[Any, ...] = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        return [self.of(table[name]) for table in tables if name in table]


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks on a module's forward that may affect its results."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = next(functions_of(hook), hook)
        file = file_of(function)
        if package_of(function) not in _HARMLESS_HOOKS and not file.startswith(_HARMLESS_PARTS):
            yield hook
    placing = getattr(module, "_hf_hook", None)
    for hook in getattr(placing, "hooks", [placing]):
        if hook is not None and type(hook).__name__ not in _PLACING:
            yield hook
