"""How coarse a model's arithmetic is, and what that does to its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

#: The spacing of numbers in which products of float32 are computed on a GPU, by
#: `torch.get_float32_matmul_precision`.
_FLOAT32_ON_GPUS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}


class RoundedEmbeddings:
    """A context in which a model's embeddings are off by a rounding, another one each time.

    Attributes:
        dtypes: those of the embeddings and of autocast, as the model met them.
    """

    def __init__(self, model: Any) -> None:
        find = getattr(model, "get_input_embeddings", None)
        layer = find() if find else None
        self.dtypes: set[torch.dtype] = set()
        self._layer = layer if isinstance(layer, nn.Module) else None
        self._calls = 0

    def __enter__(self) -> None:
        self._handle = self._layer and self._layer.register_forward_hook(self._round)

    def __exit__(self, *_: Any) -> None:
        if self._handle:
            self._handle.remove()

    def _round(self, _: nn.Module, __: tuple[Any, ...], embedded: Any) -> Any:
        if not isinstance(embedded, Tensor):
            return embedded
        self.dtypes.add(embedded.dtype)
        if torch.is_autocast_enabled(embedded.device.type):
            self.dtypes.add(torch.get_autocast_dtype(embedded.device.type))
        self._calls += 1
        places = torch.arange(embedded.numel(), device=embedded.device)
        signs = (places + 7919 * self._calls).cos().sign().view_as(embedded)
        spacing = max(torch.finfo(dtype).eps for dtype in self.dtypes)
        return embedded + embedded * (signs * spacing).to(embedded.dtype)


def rounding_of(model: nn.Module, dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """The spacing of the coarsest numbers that a model computes with, relative to them.

    Args:
        dtypes: of its states, and of autocast where that is on.
    """
    found = set(dtypes)
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(given := getattr(module, "compute_dtype", None), torch.dtype):
            found.add(given)  # of quantised weights, which are not what is multiplied
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() > 1:
            found.add(weight.dtype)
    spacings = [torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point]
    if device.type == "cuda":
        spacings.append(_FLOAT32_ON_GPUS[torch.get_float32_matmul_precision()])
    return max(spacings, default=torch.finfo(torch.float32).eps)


class Tolerance:
    """What rounding may change of what a model says of a token, seen from how its embeddings'
    being off by a rounding changes it: that grows with depth, and routers enlarge it.

    Args:
        model: which has the layers that add roundings of their own.
        rounding: of its arithmetic, as :func:`rounding_of` tells.
        changes: what the roundings of its embeddings changed, (N,) each, relative.
    """

    #: How much more may change than by a rounding of the embeddings, at least.
    TIMES: ClassVar[float] = 4
    #: What may change in any dtype: kernels sum in orders of their own.
    LEAST: ClassVar[float] = 2.0**-16

    def __init__(self, model: Any, rounding: float, changes: Sequence[Tensor]) -> None:
        self._rounding, self._changes = rounding, changes
        #: Whether each token is looked at. Coarse rounding makes a router or an indexer choose
        #: otherwise for a token here and there, so that what it does to most of them is.
        self.exact = rounding <= torch.finfo(torch.float32).eps
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
        times = max(self.TIMES, math.sqrt(layers))
        self.allowed = max(self.LEAST, self.usual(self._share) * times)

    @property
    def _share(self) -> float:
        return 1.0 if self.exact else 0.75

    def usual(self, share: float) -> float:
        """What the roundings of the embeddings changed in that share of the tokens, at most."""
        return max(self._rounding / 4, *(float(one.quantile(share)) for one in self._changes))

    def of(self, change: Tensor) -> float:
        """What has changed of (N,) tokens, to be compared with :attr:`allowed`."""
        return float(change.quantile(self._share))


def changed(one: Tensor, other: Tensor) -> Tensor:
    """(N, H) and (N, H) -> (N,): how far the first is from the other, relative to that."""
    one, other = one.float(), other.to(one.device).float()
    size = other.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    relative: Tensor = (one - other).norm(dim=-1) / size
    return relative
