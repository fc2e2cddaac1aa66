"""Reading a causal model at its response positions alone.

A causal language model projects every position to the vocabulary, although a preference loss
reads the response positions only. Here the projection runs inside the model's own forward (so
that DDP, FSDP, DeepSpeed, PEFT and quantised heads see nothing unusual), of the response
positions only, a chunk of them at a time.

Shapes: B rows, T positions, N positions read, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdpo_plugin.model.layer_kinds import attends_only
from bdpo_plugin.model.packing import cheapest_plan, pack, packable
from bdpo_plugin.model.traits import (
    at_head,
    evaluation,
    keep_differentiable,
    logits_postprocessing,
    output_head,
    select,
    text_config,
)
from bdpo_plugin.model.trial import Apart, in_order, try_gradients, try_rows

#: Logits held at once: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25

#: Logits computed at once on a CPU, which gains nothing from large chunks: those just above
#: 32 MiB go back to the system once freed.
CPU_CHUNK_ELEMENTS = 9 * 2**20

#: Tokens that a model is tried on first.
_TRIAL = 32


class Head(NamedTuple):
    """The model's projection of hidden states to logits, post-processing included.

    Attributes:
        project: (n, H) -> (n, V) float32.
        rows: how many rows to project at a time.
        held: how many rows' logits may be held for the backward pass.
        trained: whether a parameter of the projection wants a gradient.
    """

    project: Callable[[Tensor], Tensor]
    rows: int
    held: int
    trained: bool


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


class _Known(NamedTuple):
    """Of a model: whether its logits can be reproduced in chunks, and what of its batches may be
    packed: where scores are read, and where it is trained (None: not tried yet)."""

    chunked: bool
    rows: Apart
    trained_rows: Apart | None = None


#: Of a model that does not tell its output layer.
_UNKNOWN = _Known(False, Apart())


class ResponseReader:
    """Runs models and reads them at chosen positions, holding a chunk of logits at most.

    The first time that it meets a model it compares what it would compute with the model's own
    logits on one row, and on disagreement lets the model project the positions itself, all at
    once. Where the model keeps packed sequences apart, a batch runs without its padding if that
    costs less. One reader serves a whole run.
    """

    def __init__(self, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.chunk_elements = chunk_elements
        self._met: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()

    def read(
        self,
        model: nn.Module,
        positions: Tensor,
        function: Callable[[Tensor, Head], Any],
        *,
        may_pack: bool = True,
        **inputs: Any,
    ) -> tuple[Any, Any]:
        """`function(hidden, head)`, called with the states at the chosen positions.

        Args:
            model: a causal language model, however wrapped.
            positions: (B, T) bool, where the next-token logits are wanted.
            function: gets the (N, H) hidden states of the positions, row by row of the batch.
            may_pack: whether the batch may be run without its padding.
            inputs: of the model's forward.

        Returns:
            what `function` returned, and the model's outputs, whose logits are of no use.
        """
        module = output_head(model)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        # the one time that the device is waited for
        ids, mask, positions = torch.stack(
            [ids, torch.ones_like(ids) if mask is None else mask.to(ids), positions.to(ids)]
        ).cpu()
        mask, positions = mask.bool(), positions.bool()
        if module is not None and module not in self._met:
            keep_differentiable(model)
            self._met[module] = self._meet(model, module, ids, mask, inputs)
        known = self._met[module] if module is not None else _UNKNOWN
        order = None
        if may_pack and (rows := self._rows(model, module, ids[mask], inputs)).packed:
            plan = cheapest_plan(model, inputs, ids, mask, share=rows.shared)
            if plan:
                positions, inputs, order = pack(positions, inputs, mask, plan)
        project = None
        if known.chunked:
            head = self._head(model, module, inputs["input_ids"].device)

            def project(states: Tensor) -> Any:
                return function(in_order(states, order), head)

        with at_head(model, module, positions, project) as seen:
            outputs = model(**inputs)
        if seen.rows is None:  # no head, or a graph compiled before, which calls no hook
            logits = select(outputs.logits, positions)
        elif project:
            return outputs.logits, outputs
        else:
            logits = outputs.logits[0]
        every = max(1, len(logits))
        head = Head(Tensor.float, every, every, trained=False)
        return function(in_order(logits, order), head), outputs

    def token_statistics(
        self, model: nn.Module, positions: Tensor, labels: Tensor, **inputs: Any
    ) -> tuple[TokenStatistics, Any]:
        """Statistics of the (N,) tokens `labels` that follow the N positions; see :meth:`read`."""

        def function(hidden: Tensor, head: Head) -> TokenStatistics:
            # a model spread over devices may end on another one than it began on
            found = statistics(hidden, head, labels.to(hidden.device))
            return TokenStatistics(*(tensor.to(labels.device) for tensor in found))

        return self.read(model, positions, function, **inputs)

    def _head(self, model: nn.Module, module: nn.Module, device: torch.device) -> Head:
        finish = logits_postprocessing(model)
        held = chunk = self.chunk_elements
        if device.type == "cpu":
            chunk = min(chunk, CPU_CHUNK_ELEMENTS)
        vocabulary = text_config(model).vocab_size
        return Head(
            # a tied output layer may be on another device than the last layer
            project=lambda rows: finish(module(rows).float()).to(rows.device),
            rows=max(1, chunk // vocabulary),
            held=max(1, held // vocabulary),
            trained=any(p.requires_grad for p in module.parameters()),
        )

    def _rows(
        self, model: nn.Module, module: nn.Module | None, tokens: Tensor, inputs: dict[str, Any]
    ) -> Apart:
        """What may be packed now: with gradient, what has been tried with gradient as well."""
        known = self._met[module] if module is not None else _UNKNOWN
        if not (known.rows.packed and torch.is_grad_enabled()):
            return known.rows
        if known.trained_rows is None:
            with evaluation(model):
                tried = try_gradients(model, module, inputs, tokens)
            both = Apart(*map(all, zip(known.rows, tried, strict=True)))
            known = self._met[module] = known._replace(trained_rows=both)
        return known.trained_rows

    def _meet(
        self, model: nn.Module, module: nn.Module, ids: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> _Known:
        """Tries on a few tokens what is to be done with batches.

        The number of forward passes is the same in every rank: a sharded model needs it.
        """
        some = mask[0].nonzero().flatten()[:_TRIAL]
        one = {
            k: v[:1, some.to(v.device)]
            if isinstance(v, Tensor) and v.shape[:2] == mask.shape
            else v
            for k, v in inputs.items()
        }
        few = torch.ones(1, len(some), dtype=torch.bool)
        project = self._head(model, module, inputs["input_ids"].device).project
        with torch.no_grad(), evaluation(model):
            with at_head(model, module, few, None, project) as seen:
                theirs = model(**one).logits
            rows = Apart()
            if packable(model, inputs) and attends_only(model):
                rows = try_rows(model, module, inputs, ids[mask], project)
        if seen.rows is not None:
            theirs = theirs[0].float()
            # post-processing in float32 differs from the model's own by its dtype's rounding
            tolerance = max(4 * torch.finfo(seen.dtype).eps, 1e-4) * theirs.abs().max()
            mine = seen.result.to(theirs.device)
            if mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= tolerance):
                return _Known(True, rows)
        warnings.warn(
            f"bdpo-plugin does not reproduce the logits of {type(model).__name__} from its output "
            "layer, so the model projects all response positions of a batch at once: as correct, "
            "with more memory.",
            stacklevel=2,
        )
        return _UNKNOWN


def statistics(
    hidden: Tensor, head: Head, labels: Tensor, *, extras: bool = True
) -> TokenStatistics:
    """:class:`TokenStatistics` of (N,) `labels` at (N, H) `hidden`, chunk by chunk.

    Without `extras` only `logps` is computed, the rest is NaN.

    With gradient, logits that are too many to be held do not outlive their chunk's turn: where
    the head is frozen, the gradient with respect to the hidden states is computed along with the
    forward (each row's log-probability depends on its own row alone), else the chunk is computed
    again in the backward.
    """
    backward = torch.is_grad_enabled() and hidden.requires_grad
    few = len(hidden) <= (head.held if head.trained else head.rows)
    parts = []
    for rows, targets in zip(hidden.split(head.rows), labels.split(head.rows), strict=True):
        arguments = (rows, targets, head.project, extras)
        if few or not backward:
            parts.append(_statistics(*arguments))
        elif head.trained:
            parts.append(checkpoint(_statistics, *arguments, use_reentrant=False))
        else:
            parts.append(_FrozenHead.apply(*arguments))
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _statistics(
    rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = project(rows)
    logps, log_sum, probabilities, best = _Logps.apply(logits, labels)
    if not extras:
        missing = torch.full_like(logps, torch.nan, requires_grad=False)
        return logps, missing, missing, missing
    with torch.no_grad():  # last, where a checkpoint's recomputation no longer comes
        entropy = log_sum - torch.linalg.vecdot(probabilities, logits)
        return logps, entropy, logits.mean(dim=-1), (best == labels).float()


class _Logps(torch.autograd.Function):
    """(n, V) logits, (n,) labels -> (n,) log pi(label), and what the statistics are made of.

    In plain operations: hosts put kernels in the place of `torch.nn.functional.cross_entropy` that
    overwrite the logits with their gradient. One tensor as large as the logits is made and kept
    for the backward, and one more in it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        probabilities = torch.softmax(logits, dim=-1)
        best = logits.argmax(dim=-1, keepdim=True)
        highest, labels = logits.gather(-1, best), labels[:, None]
        log_highest = probabilities.gather(-1, best).log()
        # in this order no digits are lost where the label is nearly certain
        logps = (logits.gather(-1, labels) - highest) + log_highest
        ctx.save_for_backward(probabilities, labels)
        rest = (highest - log_highest).squeeze(-1), probabilities, best.squeeze(-1)
        ctx.mark_non_differentiable(*rest)
        return (logps.squeeze(-1), *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        upstream = upstream[:, None]
        return (probabilities * -upstream).scatter_add_(-1, labels, upstream), None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], extras: bool
    ):
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
    def backward(ctx: Any, upstream: Tensor, *_: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None
