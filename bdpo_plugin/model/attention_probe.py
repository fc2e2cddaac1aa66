"""Compares attention over a row in which a common prefix stands once with attention over each
sequence by itself. :mod:`~bdpo_plugin.model.probe` calls it.

The comparison runs in every layer, with the settings of that layer, on random queries, keys and
values. So differences do not accumulate over the layers. The random values make attention look at
few tokens, so that a scaling factor, a soft cap or a window that is ignored shows in every dtype.

Shapes: W tokens of the row, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.tree_attention import PrefixGroup, Tree, attend_shared, teach, window_mask

#: Standard deviations of the attention scores before the softmax. With the small one attention
#: looks at several tokens, which shows a scaling factor; the large one shows a soft cap.
_SPREADS = (3.0, 8.0)


@dataclass
class AttentionTrial:
    """Tests the attention of each layer during one forward pass of a model.

    Pass it to the model's forward as :data:`~bdpo_plugin.model.tree_attention.ARGUMENT`.

    Attributes:
        groups: the prefix groups of the row; the second sequence shares a prefix with the first.
        lengths: the lengths of the sequences, in tokens.
        windows: the sliding window that each tested layer passes to attention, in tokens, or None.
        output: relative errors of the attention output.
        slope: relative errors of the gradients with respect to (query, key, value).
        leak: the largest gradients of the output of one sequence with respect to the tokens that
            only another sequence has.
    """

    groups: Sequence[PrefixGroup]
    lengths: Sequence[int]
    windows: list[int | None] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    slope: list[Tensor] = field(default_factory=list)
    leak: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        teach()

    def __call__(
        self,
        name: str,
        attend: Callable[..., tuple[Tensor, Any]],
        module: nn.Module,
        states: tuple[Tensor, ...],
        options: dict[str, Any],
    ) -> None:
        """Tests the attention of one layer.

        Args:
            name: the name of its attention function.
            attend: its attention function.
            module: the attention layer.
            states: its (query, key, value); only their shapes and dtypes are used.
            options: the keyword arguments that the layer passes to its attention function.
        """
        options = {key: value for key, value in options.items() if key != "position_ids"}
        window, device = options.get("sliding_window"), states[0].device
        tree = Tree.of(self.groups, self.lengths, device)

        def in_row(row: Sequence[Tensor]) -> Tensor:
            return attend_shared(name, attend, tree, module, *row, **options)

        def alone(sequence: Sequence[Tensor]) -> Tensor:
            needed = window if name == "sdpa" else None
            mask = window_mask(0, sequence[0].shape[2], needed, device) if needed else None
            return attend(module, *sequence, mask, **options)[0]

        size = states[0].shape[-1]
        scaling = options.get("scaling") or size**-0.5
        for spread in _SPREADS:
            factor = math.sqrt(spread / (scaling * math.sqrt(size)))
            self._compare(states, factor, tree, in_row, alone)
        self.windows.append(window)

    def _compare(
        self,
        states: tuple[Tensor, ...],
        factor: float,
        tree: Tree,
        in_row: Callable[[Sequence[Tensor]], Tensor],
        alone_of: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        """Compares random states in a row with each sequence alone.

        Args:
            states: the (query, key, value) of a layer.
            factor: the standard deviation of the random queries and keys.
            tree: the segments of the row.
            in_row: computes the attention of the row.
            alone_of: computes the attention of one sequence.
        """
        device = states[0].device
        ends = list(accumulate(tree.sizes, initial=0))
        generator = torch.Generator().manual_seed(len(self.windows))

        def drawn(like: Tensor, factor: float) -> Tensor:
            shape = (1, like.shape[1], ends[-1], like.shape[-1])
            made = torch.randn(shape, generator=generator) * factor
            return made.to(device, like.dtype).requires_grad_()

        with torch.enable_grad():
            row = [drawn(x, f) for x, f in zip(states, (factor, factor, 1.0), strict=True)]
            together = in_row(row)
            parts, first = [], 0
            for (start, end), before in zip(pairwise(ends), tree.before, strict=True):
                first = first if before else start
                places = to_device(
                    torch.tensor([*range(first, first + before), *range(start, end)]), device
                )
                parts.append(alone_of([x[:, :, places] for x in row])[:, before:])
            alone = torch.cat(parts, dim=1)
            slopes = torch.randn(alone.shape, generator=generator).to(device)
            slope = [self._slopes(x, row, slopes) for x in (together, alone)]
            other = slopes.clone()
            other[:, : ends[1]] = 0
            other[:, ends[2] :] = 0
            passed = self._slopes(together, row, other)

        def off(one: Tensor, other: Tensor) -> Tensor:
            relative: Tensor = (one.float() - other.float()).norm() / other.float().norm()
            return relative

        with torch.no_grad():
            self.output.append(off(together, alone))
            self.slope += [off(*both) for both in zip(*slope, strict=True)]
            common = self.groups[0].shared
            for gradient in passed:
                self.leak += [gradient[:, :, common : ends[1]].abs().max()]
                self.leak += [gradient[:, :, ends[2] :].abs().max()]

    @staticmethod
    def _slopes(output: Tensor, row: Sequence[Tensor], slopes: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output.float() * slopes).sum(), row, retain_graph=True)
