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

from bdpo_plugin.model.head import (
    CHUNK_ELEMENTS,
    CPU_CHUNK_ELEMENTS,
    Head,
    TokenStatistics,
    at_head,
    select,
    statistics,
)
from bdpo_plugin.model.layer_kinds import attends_only
from bdpo_plugin.model.packing import cheapest_plan, pack, packable
from bdpo_plugin.model.traits import (
    evaluation,
    keep_differentiable,
    logits_postprocessing,
    output_head,
    text_config,
)
from bdpo_plugin.model.trial import Apart, in_order, try_gradients, try_rows

#: Tokens that a model is tried on first.
_TRIAL = 32


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
