"""The frozen reference of a run, and how it is put in force."""

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
    """The frozen reference of a run and how to put it in force.

    Attributes:
        model: the model that holds its weights: of its own, or the policy's.
        description: what it is, in words for the user.
        peft: the PEFT model whose adapters have to be switched; None where there is none.
        adapter: the adapter that is part of the reference; None: all off; ``AS_IT_IS`` (of
            :mod:`~bdpo_plugin.reference.fingerprint`) where `peft` is None.
        autocast: the context of the policy's own forward passes.
    """

    model: nn.Module
    description: str
    peft: Any = None
    adapter: str | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, as the reference, without gradient."""
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
