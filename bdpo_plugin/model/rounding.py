"""Measures how much a model's results change by rounding. The probes of padding and of packed rows
take their tolerances from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

#: The relative rounding of float32 matrix products on a GPU, for each value of
#: `torch.get_float32_matmul_precision`.
_FLOAT32_ON_GPUS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}


class RoundedEmbeddings:
    """A context in which each forward pass perturbs the model's embeddings by one rounding. Each
    call uses other signs.

    Attributes:
        dtypes: the dtypes of the embeddings and of autocast during these forward passes.
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
    """Returns the relative spacing (machine epsilon) of the coarsest arithmetic of a model.

    Args:
        model: the model.
        dtypes: the dtypes of its states, and of autocast where it is on.
        device: the device of the model.
    """
    found = {*dtypes, *(weight.dtype for weight in model.parameters() if weight.dim() > 1)}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(given := getattr(module, "compute_dtype", None), torch.dtype):
            found.add(given)  # quantised weights are multiplied in this dtype
    spacings = [torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point]
    if device.type == "cuda":
        spacings.append(_FLOAT32_ON_GPUS[torch.get_float32_matmul_precision()])
    return max(spacings, default=torch.finfo(torch.float32).eps)


class Tolerance:
    """The largest change of a token's states or logits that rounding explains.

    It is derived from the changes that :class:`RoundedEmbeddings` causes, because the effect of
    rounding grows with depth, and routers amplify it.

    Args:
        model: the model; the roundings that its layers add are counted by its number of layers.
        rounding: the rounding of its arithmetic, from :func:`rounding_of`.
        changes: relative changes caused by rounded embeddings, (N,) each.
    """

    #: The smallest factor between the allowed change and the change by rounded embeddings.
    TIMES: ClassVar[float] = 4
    #: The change that is allowed in any dtype, because kernels differ in their order of summation.
    LEAST: ClassVar[float] = 2.0**-16

    def __init__(self, model: Any, rounding: float, changes: Sequence[Tensor]) -> None:
        self._rounding, self._changes = rounding, changes
        #: Whether every token counts. With coarse rounding, a router or an indexer chooses
        #: differently for a few tokens; then only the 75 % quantile over the tokens counts.
        self.exact = rounding <= torch.finfo(torch.float32).eps
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
        times = max(self.TIMES, math.sqrt(layers))
        self.allowed = max(self.LEAST, self.usual(self._share) * times)

    @property
    def _share(self) -> float:
        return 1.0 if self.exact else 0.75

    def usual(self, share: float) -> float:
        """Returns the quantile `share` over the tokens of the changes by rounded embeddings, and at
        least a quarter of the rounding of the arithmetic."""
        return max(self._rounding / 4, *(float(one.quantile(share)) for one in self._changes))

    def of(self, change: Tensor) -> float:
        """Summarises the (N,) changes of tokens as one number, to compare with :attr:`allowed`."""
        return float(change.quantile(self._share))


def changed(one: Tensor, other: Tensor) -> Tensor:
    """Returns the (N,) distances of `one` from `other`, both (N, H), relative to `other`."""
    one, other = one.float(), other.to(one.device).float()
    size = other.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    relative: Tensor = (one - other).norm(dim=-1) / size
    return relative
