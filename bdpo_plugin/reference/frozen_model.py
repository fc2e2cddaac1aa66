"""The frozen reference model of a run, and the context in which it runs. The reference pass and the
verification of stored scores use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bdpo_plugin.model.traits import evaluation


@dataclass
class Reference:
    """The frozen reference model of a run.

    Attributes:
        model: the model that holds its weights: a separate model, or the policy.
        description: a description of the reference for the user.
        peft: the PEFT model whose adapters must be switched; None if there is none.
        adapter: the adapter that is part of the reference; None: all adapters are off;
            ``AS_IT_IS`` (of :mod:`~bdpo_plugin.reference.fingerprint`) if `peft` is None.
        autocast: returns the autocast context of the policy's own forward passes.
    """

    model: nn.Module
    description: str
    peft: Any = None
    adapter: str | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """Yields the model with the adapters of the reference, in evaluation mode and without
        gradient; restores the adapters and the mode on exit."""
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            stack.enter_context(torch.no_grad())
            if self.peft is not None and self.adapter is None:
                stack.enter_context(self.peft.disable_adapter())
            elif self.peft is not None:
                stack.callback(self.peft.set_adapter, self.peft.active_adapter)
                self.peft.set_adapter(self.adapter)
            stack.enter_context(self.autocast())
            yield self.model
