"""Tells from the kinds of a model's layers whether only attention passes information between
positions. :class:`~bdpo_plugin.model.traits.Traits` asks it.

Attention separates the sequences that share a row. A convolution, a state space model, a recurrence
or a token shift ignores attention masks and carries information from one sequence to the next, so
a model with such a layer must keep its padding. This module looks at the kinds of the layers,
because the effect may be too small to show in the probe. A layer that is not known to be harmless
counts as mixing positions.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D  # a linear layer, in spite of its name

#: The allowed values of `layer_types`, and of similar lists, in the configurations of transformers.
_ATTENTION = {"full_attention", "sliding_attention"}
_PER_TOKEN = {"dense", "sparse"}

#: Modules of torch that process each position by itself.
_PER_POSITION = (
    nn.Linear,
    nn.Bilinear,
    nn.Identity,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)

#: Packages whose modules can be judged by the names below. In other packages a forward may do
#: anything.
_PACKAGES = {
    *("torch", "transformers", "peft", "accelerate", "deepspeed"),
    *("axolotl", "llamafactory", "liger_kernel", "trl", "unsloth"),
    # packages whose layers replace linear layers
    *("bitsandbytes", "torchao", "hqq", "gptqmodel", "auto_gptq", "awq", "eetq", "aqlm"),
    *("compressed_tensors", "optimum", "auto_round", "fbgemm_gpu", "quark", "vptq"),
}

#: Names of classes and parameters that mark a layer which carries a state between positions.
_STATES = re.compile(
    r"Conv|conv_|SSM|ssm|Mamba|mamba|R[Ww][Kk][Vv]|[Rr]ecurren|Retention|Delta(Net|Rule)"
    r"|Linear_?Attention|Lightning|Hyena|L[Rr][Uu]|L[Ss][Tt][Mm]|GRU|Time_?(Mix|Shift)|TokenShift"
    r"|time_(mix|decay|shift|first)|A_log|dt_bias|Compressor|Indexer"
)


def attends_only(model: Any, config: Any) -> bool:
    """Tells whether only attention passes information between positions.

    The attention must use the attention interface of transformers, over the whole row, with rotary
    or learnt positions.

    Args:
        model: a model of transformers, without wrappers.
        config: the configuration of its language model.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return (
        getattr(model, "_supports_attention_backend", False) is True
        and not getattr(model, "_is_stateful", False)
        and _config_tells_attention(config)
        and not any(_mixes(module) for module in decoder.modules())
    )


def _config_tells_attention(config: Any) -> bool:
    layers = getattr(config, "num_hidden_layers", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    for name, value in vars(config).items():  # some models use another name than `layer_types`
        if name != "architectures" and isinstance(value, (list, tuple)) and len(value) == layers:
            kinds |= {kind for kind in value if isinstance(kind, str)}
    # ALiBi's biases grow with the position in the row, and so lose precision.
    return kinds <= _ATTENTION | _PER_TOKEN and not getattr(config, "alibi", False)


def _mixes(module: nn.Module) -> bool:
    kind = type(module)
    # The class that defines the forward; containers define none, so it is `nn.Module`.
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    package = (kind if owner is nn.Module else owner).__module__.split(".")[0]
    of_torch = {base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")}
    names = [kind.__name__, *module._parameters, *module._buffers]
    return (
        package not in _PACKAGES
        or isinstance(module, nn.MultiheadAttention)
        or not (
            of_torch == {nn.Module}
            or isinstance(module, _PER_POSITION)
            or any(base.__module__ == nn.ReLU.__module__ for base in of_torch)
        )
        or (kind is not Conv1D and any(map(_STATES.search, names)))
    )
