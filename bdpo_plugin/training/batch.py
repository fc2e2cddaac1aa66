"""A batch of preference pairs in a form that is common to all hosts; the trainers of the hosts
create it for the training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bdpo_plugin.data.pairs import Pair, split_sequence
from bdpo_plugin.training.score_columns import SCORE_COLUMNS


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs as 2B sequences of T tokens: first the B chosen sequences, then the B rejected ones.

    Attributes:
        inputs: the arguments of the model's forward, with `input_ids` and `attention_mask`, both
            (2B, T).
        completion_mask: (2B, T) bool, True for the tokens that are trained on.
    """

    inputs: dict[str, Any]
    completion_mask: Tensor

    @classmethod
    def of(
        cls, batch: Mapping[str, Any], completion_mask: Tensor, *, without: Iterable[str]
    ) -> PreferenceBatch:
        """Converts a host's batch.

        Args:
            batch: the output of the host's collator, with or without scores.
            completion_mask: (2B, T) bool, True for the tokens that are trained on.
            without: the entries of `batch` that are for the loss, and not for the model.
        """
        other = {*without, *SCORE_COLUMNS}
        inputs = {name: value for name, value in batch.items() if name not in other}
        return cls(inputs | {"use_cache": False}, completion_mask)

    @cached_property
    def on_cpu(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token ids, the attention mask and the completion mask on the CPU, (2B, T) each. They
        are copied once, together, which waits for the device."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        ids, mask, completion_mask = torch.stack(
            [ids, mask.to(ids), self.completion_mask.to(ids)]
        ).cpu()
        return ids, mask, completion_mask.bool()

    def pairs(self) -> list[Pair]:
        """Returns the B pairs without padding."""
        ids, mask, completion_mask = self.on_cpu
        sides = [
            split_sequence(row[attended].numpy(), of_completion[attended].numpy())
            for row, attended, of_completion in zip(ids, mask.bool(), completion_mask, strict=True)
        ]
        half = len(sides) // 2
        return [Pair(*of_pair) for of_pair in zip(sides[:half], sides[half:], strict=True)]
