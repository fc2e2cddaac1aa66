"""Whether a model keeps the sequences of a packed row apart, tried on short ones.

Attention gives exactly no weight to what its mask hides. So that other tokens in the place of a
neighbour change nothing, not one bit, in any dtype; what they do change in rows of one sequence
each (the load of a mixture's experts, kernels that are not deterministic) is told apart by the
same change there. A convolution, a state or a mask that was not read shows at once.

L tokens each, V vocabulary entries, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdpo_plugin.model.head import at_head, select
from bdpo_plugin.model.packing import Plan, pack, trial_plans, widest_row
from bdpo_plugin.model.traits import is_sharded, unwrapped

#: Tokens of each of the three sequences, and how many of them the first two have in common.
_LENGTH, _COMMON = 32, 8

#: What a model may say that cannot read packed rows, such as one that takes the mask of a row for
#: that of a batch.
_CANNOT = (ValueError, TypeError, IndexError, RuntimeError)


class Apart(NamedTuple):
    """Whether sequences are kept apart in a row; and whether also with their beginning shared."""

    packed: bool = False
    shared: bool = False


class _Read(NamedTuple):
    """The states before the output layer, (3, L, H), and the logits, (3, L, V) float32."""

    states: Tensor
    logits: Tensor


def try_rows(
    model: nn.Module,
    module: nn.Module,
    inputs: dict[str, Any],
    tokens: Tensor,
    project: Callable[[Tensor], Tensor],
) -> Apart:
    """What may be done with batches of the model; to be called without gradient.

    The number of forward passes is the same in every rank: a sharded model needs it.

    Args:
        module: the model's output layer.
        inputs: of the model's forward, of some batch.
        tokens: (N,) token ids of that batch, that the sequences are made of.
        project: the output layer, from (n, H) states to (n, V) float32 logits.
    """
    sequences, changed = _sequences(model, tokens)
    width = 2 * sequences.shape[1]

    def read(ids: Tensor, plan: Plan | None = None, width: int | None = None) -> _Read | None:
        where, arguments, order = _arguments(inputs, ids, plan, width)
        with at_head(model, module, where, None, project) as seen:
            model(**arguments)
        if seen.result is None:
            return None
        return _Read(
            *(in_order(t, order).unflatten(0, ids.shape) for t in (seen.rows, seen.result))
        )

    def apart(plan: Plan | None) -> bool:
        if plan is None:
            return False
        try:
            packed, other = read(sequences, plan), read(changed, plan)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT:
            return False
        if packed is None or other is None or packed.logits.shape != alone.logits.shape:
            return False
        leak = _largest(packed.states[1:], other.states[1:])
        off = _largest(packed.logits, alone.logits)
        return leak <= 4 * noise and off <= rounding

    alone, padded, beside = read(sequences), read(sequences, width=width), read(changed)
    if alone is None or padded is None or beside is None:
        return Apart()
    noise = _largest(alone.states[1:], beside.states[1:])
    # more than rounding is a position or a mask that was not read; what the leak is, is told above
    eps, height = torch.finfo(alone.states.dtype).eps, float(alone.logits.abs().max())
    spread = 4 * _largest(alone.logits, padded.logits)
    rounding = min(max(spread, max(2 * eps, 1e-4) * height), max(4 * eps, 1e-3) * height)
    packed, shared = map(apart, trial_plans(model, inputs, _common(sequences.shape[1])))
    distinct = bool((sequences[0] != changed[0]).any())  # else nothing was changed
    return Apart(packed and distinct, packed and shared and distinct)


def try_gradients(
    model: nn.Module, module: nn.Module, inputs: dict[str, Any], tokens: Tensor
) -> Apart:
    """What of it may be trained on: the gradient of one sequence with respect to the embeddings of
    the others is exactly none, and that to its own what it is in a row of its own.

    To be called in evaluation mode, in which nothing is checkpointed and nothing random; it leaves
    no gradient anywhere. A model whose weights are shared among the ranks is not tried: its
    wrapper expects each backward pass to be one of training. DDP expects it too, but the model in
    it can be run without. So the former trains on padded batches.

    Args: see :func:`try_rows`.
    """
    inner = unwrapped(model)
    embedding = inner.get_input_embeddings()
    if is_sharded(model) or not isinstance(embedding, nn.Module):
        return Apart()
    sequences, _ = _sequences(model, tokens)
    length = sequences.shape[1]
    common = _common(length)

    def gradient(plan: Plan | None = None, width: int | None = None) -> Tensor:
        """Of the second sequence, with respect to the embeddings of all three: (3, L, H)."""
        where, arguments, order = _arguments(inputs, sequences, plan, width)
        leaves = []

        def catch(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        handle = embedding.register_forward_hook(catch)
        try:
            with torch.enable_grad(), at_head(inner, module, where, lambda rows: rows) as seen:
                inner(**arguments)
                states = in_order(seen.rows, order)[length : 2 * length].float()
                slopes = torch.arange(states.numel(), device=states.device).cos().view_as(states)
                (found,) = torch.autograd.grad((states * slopes).sum(), leaves)
        finally:
            handle.remove()
        return in_order(select(found, where), order).unflatten(0, sequences.shape).float()

    def apart(plan: Plan | None) -> bool:
        if plan is None:
            return False
        found = gradient(plan)
        shared = common if any(unit.shared for row in plan for unit in row) else 0
        leak = max(float(other.abs().max()) for other in (found[0, shared:], found[2]))
        return leak == 0 and _largest(found[1], alone[1]) <= rounding

    try:
        alone, padded = gradient(), gradient(width=2 * length)
        rounding = max(
            4 * _largest(alone[1], padded[1]),
            8 * torch.finfo(torch.bfloat16).eps * float(alone.abs().max()),
        )
        return Apart(*map(apart, trial_plans(model, inputs, common)))
    except torch.OutOfMemoryError:
        raise
    except _CANNOT:
        return Apart()


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.to(one.device).float()).abs().max())


def _common(length: int) -> int:
    return _COMMON * length // _LENGTH


def in_order(states: Tensor, order: Tensor | None) -> Tensor:
    return states if order is None else states.index_select(0, order.to(states.device))


def _sequences(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Three sequences of the given tokens, (3, L), the first two with a common beginning; and the
    same with the rest of the first one changed."""
    length = int(min(_LENGTH, widest_row(model) // 3))
    common = _common(length)
    kinds, ranks = tokens.unique(return_inverse=True)
    ranks = ranks.repeat(-(-3 * length // len(ranks)))[: 3 * length].view(3, length)
    # where the tokens are few, at least not in the same order
    ranks = ranks + torch.arange(3)[:, None]
    ranks[1, :common] = ranks[0, :common]
    changed = ranks.clone()
    changed[0, common:] += 1 + torch.arange(length - common) % 3
    return kinds[ranks % len(kinds)], kinds[changed % len(kinds)]


def _arguments(
    inputs: dict[str, Any], ids: Tensor, plan: Plan | None, width: int | None = None
) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """The positions read, the arguments of the model's forward and the order of what is read:
    a row for each sequence, padded on the left to `width`, or as in `plan`."""
    device, length = inputs["input_ids"].device, ids.shape[1]
    padding = (width or length) - length
    ids = nn.functional.pad(ids, (padding, 0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, padding:] = True
    arguments = inputs | {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    if plan is not None:
        return pack(mask, arguments, mask, plan)
    if padding:
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        arguments["position_ids"] = places.to(device)
    return mask, arguments, None
