"""What a model's layers are: whether attention alone passes anything from one position to another.

Sequences of one row are kept apart by attention masks. A convolution, a state space, a recurrence
or a token shift knows of no mask, and hands on what stands before it, so that such a model must
keep its padding. This is told from the kinds of the layers, as the effect may be small in what a
model is tried on. What is not known to be attention is taken for something else.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D  # a linear layer, by another name

#: The values of `layer_types`, and of lists like it, in the configurations of transformers.
_ATTENTION = {"full_attention", "sliding_attention"}
_PER_TOKEN = {"dense", "sparse"}

#: Modules of torch that read each position by itself.
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

#: Whose modules are read by the names below: elsewhere a forward may do anything.
_PACKAGES = {
    *("torch", "transformers", "peft", "accelerate", "deepspeed"),
    *("axolotl", "llamafactory", "liger_kernel", "trl", "unsloth"),
    # whose layers take the place of linear ones
    *("bitsandbytes", "torchao", "hqq", "gptqmodel", "auto_gptq", "awq", "eetq", "aqlm"),
    *("compressed_tensors", "optimum", "auto_round", "fbgemm_gpu", "quark", "vptq"),
}

#: In the names of classes and of parameters.
_STATES = re.compile(
    r"Conv|conv_|SSM|ssm|Mamba|mamba|R[Ww][Kk][Vv]|[Rr]ecurren|Retention|Delta(Net|Rule)"
    r"|Linear_?Attention|Lightning|Hyena|L[Rr][Uu]|L[Ss][Tt][Mm]|GRU|Time_?(Mix|Shift)|TokenShift"
    r"|time_(mix|decay|shift|first)|A_log|dt_bias|Compressor|Indexer"
)


def attends_only(model: Any, config: Any) -> bool:
    """Whether all that passes between positions is attention of the interface of transformers,
    over the row, with positions that are rotary or learnt.

    Args:
        model: of transformers, without wrappers.
        config: of the language model in it.
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
    for value in vars(config).values():  # or by another name
        if isinstance(value, (list, tuple)) and len(value) == layers:
            kinds |= {kind for kind in value if isinstance(kind, str)}
    # biases of ALiBi grow with the place in the row, and lose digits
    return kinds <= _ATTENTION | _PER_TOKEN and not getattr(config, "alibi", False)


def _mixes(module: nn.Module) -> bool:
    kind = type(module)
    # whose forward it is; containers and the like have none
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
