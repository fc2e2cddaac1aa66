"""Reading a causal model at its response positions alone.

A causal language model projects every position to the vocabulary, although a preference loss
reads the response positions only. Here the projection runs inside the model's own forward (so
that DDP, FSDP, DeepSpeed, PEFT and quantised heads see nothing unusual), of the response
positions only, a chunk of them at a time.

Shapes: B rows, T positions, N positions read, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bdpo_plugin.model.device import moved
from bdpo_plugin.model.head import (
    CHUNK_ELEMENTS,
    Head,
    TokenStatistics,
    forward_calling,
    select,
    statistics,
)
from bdpo_plugin.model.packing import Apart, Plan, in_order, pack, plan_rows
from bdpo_plugin.model.traits import Traits, evaluation, output_layer, row_rules, unwrapped
from bdpo_plugin.model.trial import Abilities, try_gradients, try_out

T = TypeVar("T")


class ResponseReader:
    """Runs models and reads them at chosen positions, holding a chunk of logits at most.

    The first time that it meets a model it compares what it would compute with the model's own
    logits on one row, and on disagreement lets the model project the positions itself, all at
    once. Where the model keeps packed sequences apart, a batch runs without its padding if that
    costs less. One reader serves a whole run.
    """

    def __init__(self, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.chunk_elements = chunk_elements
        # by a model's output layer, which its wrappers share, and as long as that lives
        self._traits: WeakKeyDictionary[nn.Module, Traits] = WeakKeyDictionary()
        self._abilities: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()
        self._trained_rows: WeakKeyDictionary[nn.Module, Apart] = WeakKeyDictionary()

    def traits(self, model: nn.Module) -> Traits:
        """A model's traits, read the first time that they are asked for."""
        layer = output_layer(model)
        key = unwrapped(model) if layer is None else layer
        if key not in self._traits:
            self._traits[key] = Traits.of(model)
        return self._traits[key]

    def abilities(self, model: nn.Module) -> Abilities:
        """What a model can do, as it was seen when the model was first read.

        Raises:
            KeyError: it has not been read.
        """
        layer = output_layer(model)
        return Abilities() if layer is None else self._abilities[layer]

    def read(
        self,
        model: nn.Module,
        positions: Tensor,
        function: Callable[[Tensor, Head], T],
        *,
        may_pack: bool = True,
        device: torch.device | None = None,
        **inputs: Any,
    ) -> tuple[T, Any]:
        """`function(hidden, head)`, called with the states at the chosen positions.

        Args:
            model: a causal language model, however wrapped.
            positions: (B, T) bool, where the next-token logits are wanted.
            function: gets the (N, H) hidden states of the positions, row by row of the batch, and
                returns something.
            may_pack: whether the batch may be run without its padding.
            device: that the model takes its inputs on; default where they are. What is on the
                CPU already need not come back from it, and is moved without a wait.
            inputs: of the model's forward.

        Returns:
            what `function` returned, and the model's outputs, whose logits are of no use.
        """
        layer = output_layer(model)
        ids, mask, positions = _on_cpu(positions, **inputs)
        device = device or inputs["input_ids"].device
        head, order = None, None
        if layer is not None:
            if layer not in self._abilities:
                tried = try_out(model, layer, self.traits(model), _on(device, inputs), ids, mask)
                self._abilities[layer] = tried
            if self._abilities[layer].chunked:
                traits = self._traits[layer]
                head = Head.of(layer, traits, self.chunk_elements, device)
            plan = self._plan(model, layer, inputs, ids, mask, device) if may_pack else None
            if plan:
                positions, inputs, order = pack(positions, inputs, mask, plan, device)
        inputs = _on(device, inputs)

        def project(states: Tensor) -> Any:
            return function(in_order(states, order), head) if head else states

        found, outputs = forward_calling(
            model, layer, positions, project, inputs, instead=head is not None
        )
        if found is not None and head:
            return outputs.logits, outputs
        logits = outputs.logits[0] if found is not None else select(outputs.logits, positions)
        return function(in_order(logits, order), Head.none(logits)), outputs

    def token_statistics(
        self, model: nn.Module, positions: Tensor, labels: Tensor, **inputs: Any
    ) -> tuple[TokenStatistics, Any]:
        """Statistics of the (N,) tokens `labels` that follow the N positions; see :meth:`read`."""

        def function(hidden: Tensor, head: Head) -> TokenStatistics:
            # a model spread over devices may end on another one than it began on
            found = statistics(hidden, head, labels.to(hidden.device))
            return TokenStatistics(*(tensor.to(labels.device) for tensor in found))

        return self.read(model, positions, function, **inputs)

    def _plan(
        self,
        model: nn.Module,
        layer: nn.Module,
        inputs: dict[str, Any],
        ids: Tensor,
        mask: Tensor,
        device: torch.device,
    ) -> Plan | None:
        """How to pack a batch; with gradient, as has been tried with gradient as well. None where
        it keeps its padding."""
        rows = self._abilities[layer].rows
        rules = row_rules(model, self._traits[layer], inputs) if any(rows) else None
        if rules is None:
            return None
        if torch.is_grad_enabled():
            if layer not in self._trained_rows:
                with evaluation(model):
                    there = _on(device, inputs)
                    tried = try_gradients(model, layer, rules, there, ids[mask])
                self._trained_rows[layer] = Apart(*map(all, zip(rows, tried, strict=True)))
            rows = self._trained_rows[layer]
        return plan_rows(rules, ids, mask, rows)


def _on_cpu(
    positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The (B, T) token ids, mask and positions of a batch: the one time that its device is waited
    for."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    ids, mask, positions = torch.stack([input_ids, mask, positions.to(input_ids)]).cpu()
    return ids, mask.bool(), positions.bool()


def _on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward, on a device."""
    return {
        name: moved(value, device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
