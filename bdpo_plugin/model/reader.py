"""Reading a causal model at its response positions alone.

A causal language model projects every position to the vocabulary, although a preference loss
reads the response positions only. Here the projection runs inside the model's own forward (so
that DDP, FSDP, DeepSpeed, PEFT and quantised heads see nothing unusual), of the response
positions only, a chunk of them at a time.

Shapes: B rows, T positions, N positions read, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.head import (
    CHUNK_ELEMENTS,
    Head,
    TokenStatistics,
    forward_calling,
    select,
    statistics,
)
from bdpo_plugin.model.padding import Padding
from bdpo_plugin.model.probe import Capabilities, SharedPrefixSupport, probe, try_rows
from bdpo_plugin.model.shared_prefix import in_order, pack, plan_row
from bdpo_plugin.model.traits import (
    RowRules,
    Traits,
    evaluation,
    output_layer,
    row_rules,
    unwrapped,
)

T = TypeVar("T")


class Layout(NamedTuple):
    """How the batches of a run are laid, in scoring or in training.

    Attributes:
        kind: how they are where it pays: ``shared prefix`` or ``padded``.
        why: what stands against more than that, in words.
        batches: how many there were, by how they were laid.
        padding: what padding does to the model's numbers, by side.
    """

    kind: str
    why: str
    batches: Counter[str]
    padding: dict[str, dict[str, float]]


class ResponseReader:
    """Runs models and reads them at chosen positions, holding a chunk of logits at most.

    The first time that it meets a model it compares what it would compute with the model's own
    logits on one row, and on disagreement lets the model project the positions itself, all at
    once. Where the model keeps packed sequences apart, a batch runs without its padding if that
    costs less. One reader serves a whole run.

    Attributes:
        layouts: how batches were laid, by what they were read for: ``scoring`` (without gradient)
            and ``training``.
    """

    def __init__(self, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.chunk_elements = chunk_elements
        # by a model's output layer, which its wrappers share, and as long as that lives
        self._traits: WeakKeyDictionary[nn.Module, Traits] = WeakKeyDictionary()
        self._capabilities: WeakKeyDictionary[nn.Module, Capabilities] = WeakKeyDictionary()
        # with the loss of a router, where a model was met without it, or without where with
        self._other_rows: WeakKeyDictionary[nn.Module, SharedPrefixSupport] = WeakKeyDictionary()
        self.layouts: dict[str, Layout] = {}
        self._width = 0

    def traits(self, model: nn.Module) -> Traits:
        """A model's traits, read the first time that they are asked for."""
        key = _key(model)
        if key not in self._traits:
            self._traits[key] = Traits.of(model)
        return self._traits[key]

    def capabilities(self, model: nn.Module) -> Capabilities:
        """What a model can do, as it was seen when the model was first met.

        Raises:
            KeyError: it has not been met.
        """
        return self._capabilities[_key(model)]

    def shares(self, model: nn.Module) -> bool:
        """Whether batches of a model are laid in a row in which each beginning stands once,
        however many tokens they have; as far as is known, where it has not been met."""
        can = self._capabilities.get(_key(model))
        return can is not None and can.rows.shared and self.traits(model).widest_row == math.inf

    def probe(self, model: nn.Module, inputs: dict[str, Any], device: torch.device) -> Capabilities:
        """Try out what a model can do, unless that was done.

        Args:
            inputs: of the model's forward, of some batch.
            device: that the model takes its inputs on.
        """
        ids, mask, _ = _on_cpu(torch.zeros_like(inputs["input_ids"]), **inputs)
        return self._probed(model, inputs, ids, mask, device)

    @contextmanager
    def padded_alike(self, width: int) -> Iterator[None]:
        """Where a model's numbers depend on padding, the batches that are read in it have `width`
        tokens at least, and some padding: so two that hold a sequence say the same of it."""
        before, self._width = self._width, width
        try:
            yield
        finally:
            self._width = before

    def _probed(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        ids: Tensor,
        mask: Tensor,
        device: torch.device,
    ) -> Capabilities:
        key = _key(model)
        if key not in self._capabilities:
            self._capabilities[key] = probe(
                model, output_layer(model), self.traits(model), _on(device, inputs), ids, mask
            )
        return self._capabilities[key]

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
        can = self._probed(model, inputs, ids, mask, device)
        if layer is not None and can.chunked:
            head = Head.of(layer, self._traits[layer], self.chunk_elements, device)
        rows, rules = self._support(model, layer, inputs, ids, mask, device)
        groups = plan_row(rules, ids, mask) if may_pack and rules else None
        if groups and rules:
            positions, inputs, order = pack(positions, inputs, mask, groups, rules, device)
        elif self._width and can.padding.right.beyond_rounding:
            more = max(0, self._width - mask.shape[1])
            positions, inputs = _padded(
                positions, inputs, (0, more, 0, int(mask.all() and not more))
            )
        self._note(can.padding, rows, shared=order is not None)
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
        """Statistics of the (N,) tokens `labels` that follow the N positions, on the device of
        these; see :meth:`read`."""

        def function(hidden: Tensor, head: Head) -> TokenStatistics:
            # a model spread over devices may end on another one than it began on
            found = statistics(hidden, head, labels.to(hidden.device))
            return TokenStatistics(*(tensor.to(labels.device) for tensor in found))

        return self.read(model, positions, function, **inputs)

    def _support(
        self,
        model: nn.Module,
        layer: nn.Module | None,
        inputs: dict[str, Any],
        ids: Tensor,
        mask: Tensor,
        device: torch.device,
    ) -> tuple[SharedPrefixSupport, RowRules | None]:
        """Whether a batch may be laid in a row, and in which."""
        rows = self._capabilities[_key(model)].rows
        if not rows.shared or layer is None:
            return rows, None
        rules = row_rules(model, self._traits[layer], inputs)
        if isinstance(rules, str):
            return SharedPrefixSupport(why=rules), None
        if rows.each_once != rules.each_once:
            if layer not in self._other_rows:
                with torch.no_grad(), evaluation(model):
                    other = try_rows(model, layer, rules, _on(device, inputs), ids[mask])
                self._other_rows[layer] = other
            rows = self._other_rows[layer]
        if rows.windows:
            rules = rules._replace(longest=math.inf)
        return rows, rules if rows.shared else None

    def _note(self, padding: Padding, rows: SharedPrefixSupport, *, shared: bool) -> None:
        """What was made of a batch, for :attr:`layouts`."""
        use = "training" if torch.is_grad_enabled() else "scoring"
        kinds = ("padded", "shared prefix")
        if use not in self.layouts:
            effects = {side: one._asdict() for side, one in padding._asdict().items()}
            self.layouts[use] = Layout(kinds[rows.shared], rows.why, Counter(), effects)
        self.layouts[use].batches[kinds[shared]] += 1


def _key(model: nn.Module) -> nn.Module:
    """What a model is known by: its output layer, which its wrappers share; else itself."""
    layer = output_layer(model)
    key: nn.Module = unwrapped(model) if layer is None else layer
    return key


def _padded(
    positions: Tensor, inputs: dict[str, Any], more: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """A (B, T) batch with `more` columns and rows, as `torch.nn.functional.pad` takes them."""
    shape = inputs["input_ids"].shape
    padded = {
        name: nn.functional.pad(value, more)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == shape
    }
    padded["attention_mask"][len(positions) :, 0] = 1  # a row of padding alone has no numbers
    return nn.functional.pad(positions, more), inputs | padded


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
        name: to_device(value, device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
