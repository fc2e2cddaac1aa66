"""Reads a causal language model at its response positions only. The reference pass and the training
step use one reader.

A causal language model projects every position to the vocabulary, although a preference loss
needs the response positions only. Here the projection covers the response positions only, a chunk
of them at a time. It runs inside the model's own forward, so that DDP, FSDP, DeepSpeed, PEFT and
quantised heads work as usual.

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
from bdpo_plugin.model.probe import Capabilities, probe
from bdpo_plugin.model.row_probe import SharedPrefixSupport, try_rows
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
    """How the batches of a run are arranged, in scoring or in training.

    Attributes:
        kind: the arrangement used where it saves tokens: ``shared prefix`` or ``padded``.
        why: the reason if batches cannot share prefixes; else empty.
        batches: the number of batches run in each arrangement.
        padding: the effects of padding on the model's logits, on the left and on the right.
    """

    kind: str
    why: str
    batches: Counter[str]
    padding: dict[str, dict[str, float]]


class ResponseReader:
    """Runs models and reads them at chosen positions, with at most one chunk of logits in memory.

    Before its first read of a model, it compares logits from the output layer with the model's own
    logits on one row. If they differ, the model projects the positions itself, all at once. If the
    model keeps packed sequences independent, a batch runs without padding where that costs less.
    One reader serves a whole run.

    Attributes:
        layouts: how the batches were arranged, for ``scoring`` (without gradient) and for
            ``training``.
    """

    def __init__(self, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.chunk_elements = chunk_elements
        # The key is the output layer, which a model and its wrappers share. An entry lives as long
        # as the layer.
        self._traits: WeakKeyDictionary[nn.Module, Traits] = WeakKeyDictionary()
        self._capabilities: WeakKeyDictionary[nn.Module, Capabilities] = WeakKeyDictionary()
        # results for batches with the router's loss if the model was probed without it, or for
        # batches without that loss if it was probed with it
        self._other_rows: WeakKeyDictionary[nn.Module, SharedPrefixSupport] = WeakKeyDictionary()
        self.layouts: dict[str, Layout] = {}
        self._width = 0

    def traits(self, model: nn.Module) -> Traits:
        """Returns a model's traits, which are read once."""
        key = _key(model)
        if key not in self._traits:
            self._traits[key] = Traits.of(model)
        return self._traits[key]

    def capabilities(self, model: nn.Module) -> Capabilities:
        """Returns the results of the probe of a model.

        Raises:
            KeyError: The model has not been probed.
        """
        return self._capabilities[_key(model)]

    def shares(self, model: nn.Module) -> bool:
        """Whether batches of any size of a model run in one row in which a common prefix stands
        once. False for a model that has not been probed yet."""
        can = self._capabilities.get(_key(model))
        return can is not None and can.rows.shared and self.traits(model).widest_row == math.inf

    def probe(self, model: nn.Module, inputs: dict[str, Any], device: torch.device) -> Capabilities:
        """Probes a model, unless that has been done.

        Args:
            model: a causal language model, in any wrapper.
            inputs: the arguments of the model's forward for some batch.
            device: the device on which the model takes its inputs.
        """
        ids, mask, _ = _on_cpu(torch.zeros_like(inputs["input_ids"]), **inputs)
        return self._probed(model, inputs, ids, mask, device)

    @contextmanager
    def padded_alike(self, width: int) -> Iterator[None]:
        """Pads the batches that are read in this context to at least `width` tokens.

        It does so only for models whose logits depend on padding. Each batch then has some padding,
        so that a sequence gets the same logits in each.
        """
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
        """Runs a forward pass and calls `function(hidden, head)` with the states at the chosen
        positions.

        Args:
            model: a causal language model, in any wrapper.
            positions: (B, T) bool, the positions whose next-token logits are needed.
            function: takes the (N, H) hidden states of the positions, row by row of the batch, and
                the model's head.
            may_pack: whether the batch may be run without its padding.
            device: the device on which the model takes its inputs; default: the device of
                `inputs`. Pass it together with inputs on the CPU: then nothing is copied back from
                the device, and the copy to it does not wait.
            inputs: the arguments of the model's forward.

        Returns:
            The result of `function` and the model's outputs. Do not use the logits of the outputs.
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
        `labels`. The other arguments are those of :meth:`read`."""

        def function(hidden: Tensor, head: Head) -> TokenStatistics:
            # the first and the last layer of a model may be on different devices
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
        """Returns whether a batch may run in one row, and the limits on that row if it may."""
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
        """Records in :attr:`layouts` how a batch was arranged."""
        use = "training" if torch.is_grad_enabled() else "scoring"
        kinds = ("padded", "shared prefix")
        if use not in self.layouts:
            effects = {side: one._asdict() for side, one in padding._asdict().items()}
            self.layouts[use] = Layout(kinds[rows.shared], rows.why, Counter(), effects)
        self.layouts[use].batches[kinds[shared]] += 1


def _key(model: nn.Module) -> nn.Module:
    """Returns the module that identifies a model: its output layer, which its wrappers share, or
    the model without wrappers if it does not name one."""
    layer = output_layer(model)
    key: nn.Module = unwrapped(model) if layer is None else layer
    return key


def _padded(
    positions: Tensor, inputs: dict[str, Any], more: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Pads a (B, T) batch with columns and rows, given as `torch.nn.functional.pad` takes them."""
    shape = inputs["input_ids"].shape
    padded = {
        name: nn.functional.pad(value, more)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == shape
    }
    padded["attention_mask"][len(positions) :, 0] = 1  # attention over padding only would give NaN
    return nn.functional.pad(positions, more), inputs | padded


def _on_cpu(
    positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies the (B, T) token ids, mask and positions of a batch to the CPU. This is the only time
    that a read waits for the device of the batch."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    ids, mask, positions = torch.stack([input_ids, mask, positions.to(input_ids)]).cpu()
    return ids, mask.bool(), positions.bool()


def _on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    """Moves the inputs of a forward pass to a device."""
    return {
        name: to_device(value, device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
