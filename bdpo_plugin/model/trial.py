"""What a model can do, tried on short sequences when it is met.

Whether its output layer can be run apart is seen from the model's own logits. Whether the
sequences of a packed row are kept apart: attention gives exactly no weight to what its mask
hides. So that other tokens in the place of a neighbour change nothing, not one bit, in any dtype;
what they do change in rows of one sequence each (the load of a mixture's experts, kernels that
are not deterministic) is told apart by the same change there. A convolution, a state or a mask
that was not read shows at once.

B rows of T positions in a batch, L tokens in each sequence of a trial, V vocabulary entries, H
hidden size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bdpo_plugin.model.head import forward_calling, select
from bdpo_plugin.model.packing import Apart, Plan, in_order, pack, trial_plans
from bdpo_plugin.model.padding import Padding, PaddingEffect, try_padding
from bdpo_plugin.model.traits import (
    RowRules,
    Traits,
    evaluation,
    is_sharded,
    row_rules,
    unwrapped,
)

T = TypeVar("T")

#: Tokens that a model's output layer is tried on.
_FEW = 32

#: Tokens of each of the three sequences, and how many of them the first two have in common.
_LENGTH, _COMMON = 16, 4

#: What a model may say that cannot read packed rows, such as one that takes the mask of a row for
#: that of a batch.
_CANNOT = (ValueError, TypeError, IndexError, RuntimeError)


class Abilities(NamedTuple):
    """What a model can do, where nothing is trained.

    Attributes:
        padding: what padding does to its numbers.
        chunked: its logits can be had from its output layer, a chunk of positions at a time.
        rows: how its batches may be packed.
    """

    padding: Padding
    chunked: bool = False
    rows: Apart = Apart()


def try_out(
    model: nn.Module,
    layer: nn.Module | None,
    traits: Traits,
    inputs: dict[str, Any],
    ids: Tensor,
    mask: Tensor,
) -> Abilities:
    """What a model can do; where its logits are not those of its output layer, little, and the
    user is told.

    The number of forward passes is the same in every rank: a sharded model needs it.

    Args:
        layer: its output layer, if it tells.
        inputs: of its forward, of some batch.
        ids, mask: the token ids and the attention mask of that batch, (B, T), on the CPU.
    """
    _keep_differentiable(model)
    longest = mask.sum(dim=1).argmax()
    with torch.no_grad(), evaluation(model):
        limit = min(traits.widest_row, traits.position_limit or math.inf)
        try:
            padding = try_padding(model, layer, inputs, ids[longest][mask[longest]], limit)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT as error:
            padding = Padding(*[PaddingEffect(unknown=_in_short(error))] * 2)
    if layer is None:
        return Abilities(padding, rows=Apart(why="it does not tell its output layer"))
    some = mask[0].nonzero().flatten()[:_FEW]
    one = {
        name: value[:1, some.to(value.device)]
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape
        else value
        for name, value in inputs.items()
    }
    few = torch.ones(1, len(some), dtype=torch.bool)
    with torch.no_grad(), evaluation(model):
        bare, outputs = forward_calling(model, layer, few, layer, one, instead=False)
        rules = row_rules(model, traits, inputs)
        if not traits.attends_only:
            rows = Apart(why="not all that passes between its positions is known to be attention")
        elif isinstance(rules, str):
            rows = Apart(why=rules)
        else:
            rows = try_rows(model, layer, rules, inputs, ids[mask])
        if bare is not None:
            theirs = outputs.logits[0].float()
            # post-processing in float32 differs from the model's own by its dtype's rounding
            tolerance = max(4 * torch.finfo(bare.dtype).eps, 1e-4) * theirs.abs().max()
            mine = traits.finished(bare.float()).to(theirs.device)
            if mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= tolerance):
                return Abilities(padding, True, rows)
    warnings.warn(
        f"bdpo-plugin does not reproduce the logits of {type(model).__name__} from its output "
        "layer, so the model projects all response positions of a batch at once: as correct, "
        "with more memory.",
        stacklevel=2,
    )
    return Abilities(padding, rows=Apart(why="its logits are not those of its output layer alone"))


def _keep_differentiable(model: nn.Module) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes packs a layer's 4-bit weights at its first use
    in evaluation mode: in place, with a rounding, and without a gradient ever after."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def try_rows(
    model: nn.Module,
    layer: nn.Module,
    rules: RowRules,
    inputs: dict[str, Any],
    tokens: Tensor,
) -> Apart:
    """How batches of the model may be packed; to be called without gradient.

    The number of forward passes is the same in every rank: a sharded model needs it.

    Args:
        layer: the model's output layer.
        rules: of that batch.
        inputs: of the model's forward, of some batch.
        tokens: (N,) token ids of that batch, that the sequences are made of.
    """
    sequences, changed = _sequences(rules, tokens)
    width = 2 * sequences.shape[1]

    def read(ids: Tensor, plan: Plan | None = None, width: int | None = None) -> Tensor:
        """The states before the output layer, (3, L, H)."""
        where, arguments, order = _arguments(inputs, ids, plan, width)
        found = _seen(model, layer, where, lambda rows: rows, arguments, instead=True)
        states: Tensor = in_order(found, order).unflatten(0, ids.shape)
        return states

    def refusal(plan: Plan) -> str:
        packed, other = read(sequences, plan), read(changed, plan)
        leak = _largest(packed[1:], other[1:])
        return _beyond("other tokens in one sequence change another one", leak, 4 * noise) or (
            _beyond("the states are not those of each alone", _largest(packed, alone), rounding)
        )

    try:
        alone, padded, beside = read(sequences), read(sequences, width=width), read(changed)
    except _NotCalled as error:
        return Apart(why=str(error))
    noise = _largest(alone[1:], beside[1:])
    # more than rounding is a position or a mask that was not read; what the leak is, is told above
    eps, height = torch.finfo(alone.dtype).eps, float(alone.abs().max())
    spread = 4 * _largest(alone, padded)
    rounding = min(max(spread, max(2 * eps, 1e-4) * height), max(4 * eps, 1e-3) * height)
    found = _tried(refusal, rules, sequences.shape[1], both=is_sharded(model))
    distinct = bool((sequences[0] != changed[0]).any())  # else nothing was changed
    return found if distinct else Apart(why="all tokens that it was tried on are the same")


def try_gradients(
    model: nn.Module,
    layer: nn.Module,
    rules: RowRules,
    inputs: dict[str, Any],
    tokens: Tensor,
) -> Apart:
    """What of it may be trained on: the gradient of one sequence with respect to the embeddings of
    the others is exactly none, and that to its own what it is in a row of its own.

    To be called in evaluation mode, in which nothing is checkpointed and nothing random; it leaves
    no gradient anywhere. A model whose weights are shared among the ranks is not tried: its
    wrapper expects each backward pass to be one of training. DDP expects it too, but the model in
    it can be run without. So the former trains on padded batches.

    Args: see :func:`try_rows`.
    """
    embedding = unwrapped(model).get_input_embeddings()
    if is_sharded(model):
        return Apart(why="its weights are shared among the ranks, so that no gradient was tried")
    if not isinstance(embedding, nn.Module):
        return Apart(why="it does not tell its embeddings, so that no gradient was tried")
    model = unwrapped(model)
    sequences, _ = _sequences(rules, tokens)
    length = sequences.shape[1]
    common = _common(length)

    def gradient(plan: Plan | None = None, width: int | None = None) -> Tensor:
        """Of the second sequence, with respect to the embeddings of all three: (3, L, H)."""
        where, arguments, order = _arguments(inputs, sequences, plan, width)
        leaves: list[Tensor] = []

        def catch(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        handle = embedding.register_forward_hook(catch)
        try:
            with torch.enable_grad():
                states = _seen(model, layer, where, lambda rows: rows, arguments, instead=True)
                states = in_order(states, order)[length : 2 * length].float()
                slopes = torch.arange(states.numel(), device=states.device).cos().view_as(states)
                (found,) = torch.autograd.grad((states * slopes).sum(), leaves)
        finally:
            handle.remove()
        whole: Tensor = in_order(select(found, where), order).unflatten(0, sequences.shape)
        return whole.float()

    def refusal(plan: Plan) -> str:
        found = gradient(plan)
        shared = common if any(unit.shared for row in plan.rows for unit in row) else 0
        leak = max(float(other.abs().max()) for other in (found[0, shared:], found[2]))
        return _beyond("a gradient passes from one sequence to another", leak, 0) or (
            _beyond("the gradients are not those alone", _largest(found[1], alone[1]), rounding)
        )

    try:
        alone, padded = gradient(), gradient(width=2 * length)
    except torch.OutOfMemoryError:
        raise
    except _CANNOT as error:
        return Apart(why=f"no gradient could be tried: {_in_short(error)}")
    rounding = max(
        4 * _largest(alone[1], padded[1]),
        8 * torch.finfo(torch.bfloat16).eps * float(alone.abs().max()),
    )
    return _tried(refusal, rules, length)


def _beyond(what: str, found: float, allowed: float) -> str:
    """What to say of a difference; nothing where it is allowed."""
    return "" if found <= allowed else f"{what}: by {found:.2g}, where {allowed:.2g} is allowed"


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _tried(
    refusal: Callable[[Plan], str], rules: RowRules, length: int, *, both: bool = False
) -> Apart:
    """What the trials of the plans say.

    Args:
        refusal: why a plan is refused, tried on the model; nothing where it is right.
        length: of each sequence of the trial.
        both: whether to try rows without a tree also where none will be needed.
    """

    def why_not(plan: Plan) -> str:
        try:
            return refusal(plan)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT as error:
            return _in_short(error)

    rows, tree = trial_plans(rules, length, _common(length))
    no_tree = why_not(tree) if tree else "its attention takes no common beginning"
    needed = both or bool(no_tree) or min(rules.window, rules.widest) < math.inf
    no_rows = why_not(rows) if needed else "not needed"
    whys = (("a common beginning", no_tree), ("rows without padding", needed and no_rows))
    why = "; ".join(f"{what}: {reason}" for what, reason in whys if reason)
    return Apart(not no_rows, not no_tree, why)


class _NotCalled(RuntimeError):
    """The output layer was not called, as in a graph that was compiled before."""

    def __init__(self) -> None:
        super().__init__("its output layer is not called, as in a graph that was compiled before")


def _seen(
    model: nn.Module,
    layer: nn.Module,
    positions: Tensor,
    function: Callable[[Tensor], T],
    inputs: dict[str, Any],
    *,
    instead: bool,
) -> T:
    """What `function` returned in :func:`forward_calling`.

    Raises:
        _NotCalled: it was not called.
    """
    found, _ = forward_calling(model, layer, positions, function, inputs, instead=instead)
    if found is None:
        raise _NotCalled
    return found


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.to(one.device).float()).abs().max())


def _common(length: int) -> int:
    return _COMMON * length // _LENGTH


def _sequences(rules: RowRules, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Three sequences of the given tokens, (3, L), the first two with a common beginning; and the
    same with the rest of the first one changed."""
    length = int(min(_LENGTH, rules.widest // 3))
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
