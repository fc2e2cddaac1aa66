"""The output layer of a causal language model: a forward pass that calls a function at this layer,
and log-probabilities computed from its logits in chunks. The response reader and the scoring of
the reference pass call them.

Shapes: B rows, T positions, N positions read, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.traits import Traits, unwrapped

T = TypeVar("T")

#: The most logits held in memory at once: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25

#: The most logits computed at once on a CPU, which gains nothing from larger chunks. Such a chunk
#: is just above 32 MiB, so that its memory goes back to the system once it is freed.
CPU_CHUNK_ELEMENTS = 9 * 2**20

#: The number of logits in a block that a CPU reads at once: 2 MiB in float32.
CPU_BLOCK_ELEMENTS = 2**19


class Head(NamedTuple):
    """The model's projection of hidden states to logits, post-processing included.

    Attributes:
        project: (n, H) -> (n, V) float32, which may be overwritten.
        rows: how many rows to project at a time where the logits are not kept for a backward pass.
        held: how many rows of logits may be kept for the backward pass.
        trained: whether a parameter of the projection requires a gradient.
    """

    project: Callable[[Tensor], Tensor]
    rows: int
    held: int
    trained: bool

    @classmethod
    def of(cls, layer: nn.Module, traits: Traits, elements: int, device: torch.device) -> Head:
        """Builds the head of a model.

        Args:
            layer: the output layer of the model.
            traits: the traits of the model.
            elements: the most logits that may be held at a time.
            device: the device that the model runs on.
        """
        chunk = min(elements, CPU_CHUNK_ELEMENTS) if device.type == "cpu" else elements
        return cls(
            projection(layer, traits),
            rows=max(1, chunk // traits.vocabulary),
            held=max(1, elements // traits.vocabulary),
            trained=any(p.requires_grad for p in layer.parameters()),
        )

    @classmethod
    def none(cls, logits: Tensor) -> Head:
        """Returns a head for (n, V) logits that stand in place of the hidden states."""
        rows = max(1, len(logits))
        return cls(lambda part: part.to(torch.float32, copy=True), rows, rows, trained=False)


def projection(layer: nn.Module, traits: Traits) -> Callable[[Tensor], Tensor]:
    """Returns a function (n, H) -> (n, V) float32: the output layer and the model's post-processing
    of the logits."""
    # A tied output layer may be on another device than the last layer.
    return lambda rows: traits.postprocess_logits(layer(rows).float()).to(rows.device)


class TokenStatistics(NamedTuple):
    """Statistics of the next token at each of N positions; all (N,) float32. Only `logps` has a
    gradient.

    Attributes:
        logps: log pi(token), nats.
        entropy: entropy of the next-token distribution, nats.
        mean_logits: mean of the logits over the vocabulary.
        correct: 1 where the token is the most likely one, else 0.
    """

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    correct: Tensor


def forward_calling(
    model: nn.Module,
    layer: nn.Module | None,
    positions: Tensor,
    function: Callable[[Tensor], T],
    inputs: dict[str, Any],
    *,
    instead: bool,
) -> tuple[T | None, Any]:
    """Runs one forward pass of a model and calls `function` at its output layer.

    Args:
        model: a causal language model, in any wrapper.
        layer: its output layer, or None if the model does not name one.
        positions: (B, T) bool, on the CPU: the N positions to read.
        function: takes the (N, H) input states of the layer, and may call the layer itself.
        inputs: the arguments of the model's forward.
        instead: if True, the model returns the result of `function` in place of the logits, and
            the layer itself runs on a single position. Else the layer runs on the N positions as
            one row of a batch, and the model returns their (1, N, V) logits.

    Returns:
        The result of `function` and the model's outputs. The result is None if `function` was not
        called: there is no layer, or the model is a graph that was compiled earlier and calls no
        hooks. For a backward pass, take the result of `function` from the outputs: FSDP and DDP
        prepare the backward pass at the outputs of the model.
    """
    waiting: list[Tensor] = []
    results: list[T] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        if states.dim() != 3 or states.shape[1] < positions.shape[1]:
            return None
        waiting[:] = [select(states, positions)]
        # Some quantised layers cannot take an empty input.
        return (states[:1, :1] if instead else waiting[0][None], *args[1:])

    def after(*_: Any) -> None:
        if waiting:  # empty if `function` itself calls the layer
            results[:] = [function(waiting.pop())]

    def leave(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> None:
        if results:
            outputs.logits = results[0]

    handles = []
    if layer is not None:
        handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    if instead:
        handles.append(unwrapped(model).register_forward_hook(leave))
    try:
        outputs = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (results[0] if results else None), outputs


def select(states: Tensor, positions: Tensor) -> Tensor:
    """Selects from (B, T, H) states or logits the (N, H) ones where `positions` is True; it is
    (B, T) and on the CPU."""
    # The virtual tokens of prompt learning come before the real tokens.
    states = states[:, -positions.shape[1] :].flatten(0, 1)
    # `nonzero` on the CPU does not wait for the device.
    return states[to_device(positions.flatten().nonzero().squeeze(1), states.device)]


def statistics(
    hidden: Tensor, head: Head, labels: Tensor, *, extras: bool = True
) -> TokenStatistics:
    """Computes :class:`TokenStatistics` of (N,) `labels` at (N, H) `hidden`, chunk by chunk.

    Without `extras` it computes `logps` only, and the rest is NaN.

    With gradient and a frozen head, the logits of a chunk are freed before the next chunk: the
    gradient with respect to the hidden states is computed in the forward pass, which is possible
    because the log-probability of a row depends on that row alone. With gradient and a trained
    head, a chunk is as large as may be held for the backward pass, because the gradient of each
    chunk is as large as the head; if there are several chunks, they are computed again in the
    backward pass.
    """
    backward = torch.is_grad_enabled() and hidden.requires_grad
    size = head.held if backward and head.trained else head.rows
    parts = []
    for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
        arguments = (rows, targets, head.project, extras)
        if not backward or len(hidden) <= size:
            parts.append(_statistics(*arguments))
        elif head.trained:
            parts.append(checkpoint(_statistics, *arguments, use_reentrant=False))
        else:
            parts.append(_frozen_head(*arguments))
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def block_rows(logits: Tensor) -> int:
    """Number of rows of (n, V) logits to read at once."""
    if logits.device.type != "cpu":
        return len(logits)
    return min(len(logits), max(1, CPU_BLOCK_ELEMENTS // logits.shape[-1]))


def _statistics(
    rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _logit_statistics(project(rows), labels, extras)


class _LogitStatistics(torch.autograd.Function):
    """Computes :class:`TokenStatistics` from (n, V) float32 logits and (n,) labels.

    The logits are read once, in blocks that fit into the processor's cache. With gradient, the
    gradient of the log-probabilities overwrites the logits, so that no other tensor of their size
    is allocated or kept. Only plain operations are used, because hosts replace
    `torch.nn.functional.cross_entropy` by kernels of their own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, extras: bool) -> tuple[Tensor, ...]:
        with_gradient = ctx.needs_input_grad[0]
        size = block_rows(logits)
        buffer = logits.new_empty(size, logits.shape[-1])
        columns = []
        for part, label in zip(logits.split(size), labels[:, None].split(size), strict=True):
            highest, own = part.amax(dim=-1, keepdim=True), part.gather(-1, label)
            terms = torch.sub(part, highest, out=buffer[: len(part)]).exp_()
            # torch.softmax on the CPU loses the small terms of a large vocabulary
            total = terms.sum(dim=-1, keepdim=True)
            # this order loses no precision where the label is nearly certain
            found = [(own - highest) - total.log()]
            if extras:
                mean, correct = part.mean(dim=-1, keepdim=True), (own == highest).float()
                expected = torch.linalg.vecdot(terms, part)[:, None] / total
                found += [(highest - expected) + total.log(), mean, correct]
            else:
                found += [torch.full_like(own, torch.nan)] * 3
            if with_gradient:
                torch.mul(terms, -1 / total, out=part)
                part.scatter_add_(-1, label, torch.ones_like(own))
            columns.append(torch.cat(found, dim=1))
        logps, *rest = torch.cat(columns).unbind(dim=1)
        if with_gradient:
            ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(*rest)
        return (logps, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[:, None]), None, None


_logit_statistics: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _LogitStatistics.apply


class _FrozenHead(torch.autograd.Function):
    """Computes :func:`_statistics` and, in the same forward pass, the gradient with respect to
    `rows`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
    ) -> tuple[Tensor, ...]:
        # Nothing is saved for a later backward pass here, so the host's hooks that offload saved
        # tensors must not run.
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), keep:
            leaf = rows.detach().requires_grad_()
            logps, *rest = _statistics(leaf, labels, project, extras)
            (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*rest)
        return (logps.detach(), *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None


_frozen_head: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _FrozenHead.apply


def sum_by_row(values: Tensor, positions: Tensor) -> Tensor:
    """Sums (N,) values over each row of a batch.

    Args:
        values: (N,), one for each True of `positions`, row by row.
        positions: (B, T) bool, on the CPU.

    Returns:
        (B,) float32 sums.
    """
    where = to_device(positions.flatten().nonzero().squeeze(1), values.device)
    spread = torch.zeros(positions.numel(), dtype=torch.float32, device=values.device)
    return spread.index_copy(0, where, values.float()).view(positions.shape).sum(dim=1)
