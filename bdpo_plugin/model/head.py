"""The output layer of a causal language model: a forward that calls a function at it, and its
projection in chunks.

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

#: Logits held at once: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25

#: Logits computed at once on a CPU, which gains nothing from large chunks: those just above
#: 32 MiB go back to the system once freed.
CPU_CHUNK_ELEMENTS = 9 * 2**20

#: Logits that a CPU reads at once: 2 MiB in float32.
CPU_BLOCK_ELEMENTS = 2**19


class Head(NamedTuple):
    """The model's projection of hidden states to logits, post-processing included.

    Attributes:
        project: (n, H) -> (n, V) float32, which may be overwritten.
        rows: how many rows to project at a time where the logits are not held.
        held: how many rows' logits may be held for the backward pass.
        trained: whether a parameter of the projection wants a gradient.
    """

    project: Callable[[Tensor], Tensor]
    rows: int
    held: int
    trained: bool

    @classmethod
    def of(cls, layer: nn.Module, traits: Traits, elements: int, device: torch.device) -> Head:
        """Of a model.

        Args:
            layer: its output layer.
            elements: of logits that are held at a time, at most.
            device: that it runs on.
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
        """Where the (n, V) logits themselves stand in the place of the hidden states."""
        rows = max(1, len(logits))
        return cls(lambda part: part.to(torch.float32, copy=True), rows, rows, trained=False)


def projection(layer: nn.Module, traits: Traits) -> Callable[[Tensor], Tensor]:
    """(n, H) -> (n, V) float32, by a model's output layer and what it does after that."""
    # a tied output layer may be on another device than the last layer
    return lambda rows: traits.postprocess_logits(layer(rows).float()).to(rows.device)


class TokenStatistics(NamedTuple):
    """What is read at each of N positions; all (N,) float32, only `logps` with gradient.

    Attributes:
        logps: log pi(token), nats.
        entropy: of the next-token distribution, nats.
        mean_logits: over the vocabulary.
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
    """One forward of a model, in which `function` is called at its output layer.

    Args:
        model: a causal language model, however wrapped.
        layer: its output layer, if it tells.
        positions: (B, T) bool, on the CPU: the N that are read.
        function: gets the (N, H) states before the layer, and may call the layer itself.
        inputs: of the model's forward.
        instead: whether what `function` returns leaves the model in the place of the logits; the
            layer itself is then given a single position. Else it is given the N positions as one
            row of a batch, and the (1, N, V) logits of these leave the model.

    Returns:
        what `function` returned, or None where it was not called: there is no layer, or a graph
        that was compiled before calls no hook; the model's outputs. For a backward pass, take what
        `function` returned from these: FSDP and DDP prepare it at what leaves the model.
    """
    waiting: list[Tensor] = []
    results: list[T] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        if states.dim() != 3 or states.shape[1] < positions.shape[1]:
            return None
        waiting[:] = [select(states, positions)]
        # some quantised layers cannot take an empty input
        return (states[:1, :1] if instead else waiting[0][None], *args[1:])

    def after(*_: Any) -> None:
        if waiting:  # not where `function` calls the layer
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
    """(B, T, H) states or logits -> (N, H), at the (B, T) positions, on the CPU, that are True."""
    # the virtual tokens of prompt learning come before the positions of the real ones
    states = states[:, -positions.shape[1] :].flatten(0, 1)
    # the CPU knows how many there are: no wait for the device
    return states[to_device(positions.flatten().nonzero().squeeze(1), states.device)]


def statistics(
    hidden: Tensor, head: Head, labels: Tensor, *, extras: bool = True
) -> TokenStatistics:
    """:class:`TokenStatistics` of (N,) `labels` at (N, H) `hidden`, chunk by chunk.

    Without `extras` only `logps` is computed, the rest is NaN.

    With gradient, where the head is frozen, no logits outlive their chunk's turn: the gradient with
    respect to the hidden states is computed along with the forward (each row's log-probability
    depends on its own row alone). Where it is trained, a chunk is as large as may be held for the
    backward, as each chunk's gradient is as large as the head; if there are more of them, they are
    computed again in the backward.
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
    """How many rows of (n, V) logits to read at once."""
    if logits.device.type != "cpu":
        return len(logits)
    return min(len(logits), max(1, CPU_BLOCK_ELEMENTS // logits.shape[-1]))


def _statistics(
    rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _logit_statistics(project(rows), labels, extras)


class _LogitStatistics(torch.autograd.Function):
    """(n, V) float32 logits, (n,) labels -> :class:`TokenStatistics`.

    The logits are read once, a block at a time that stays in the processor's cache, and with
    gradient are overwritten by that of the log-probabilities with respect to them: nothing else of
    their size is made or kept. In plain operations: hosts put kernels of their own in the place of
    `torch.nn.functional.cross_entropy`.
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
            # not torch.softmax, which on the CPU loses the small terms of a large vocabulary
            total = terms.sum(dim=-1, keepdim=True)
            # in this order no digits are lost where the label is nearly certain
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
    """:func:`_statistics`, with the gradient computed along with the forward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
    ) -> tuple[Tensor, ...]:
        # nothing is kept for a later backward: a host that offloads what is has no part in it
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
    """(N,) values at the (B, T) positions that are True, on the CPU, row by row -> (B,) float32
    sums."""
    where = to_device(positions.flatten().nonzero().squeeze(1), values.device)
    spread = torch.zeros(positions.numel(), dtype=torch.float32, device=values.device)
    return spread.index_copy(0, where, values.float()).view(positions.shape).sum(dim=1)
