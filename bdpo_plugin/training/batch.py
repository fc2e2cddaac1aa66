"""A batch of preference pairs, as those of all hosts are made into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdpo_plugin.data.pairs import Pair, split_sequence
from bdpo_plugin.training.score_columns import SCORE_COLUMNS


class PreferenceBatch(NamedTuple):
    """B pairs in sequences of T tokens: the B chosen ones, then the B rejected.

    Attributes:
        inputs: of the model's forward, `input_ids` and `attention_mask` (2B, T) among them.
        completion_mask: (2B, T) bool, the tokens that are trained on.
    """

    inputs: dict[str, Any]
    completion_mask: Tensor

    @classmethod
    def of(
        cls, batch: Mapping[str, Any], completion_mask: Tensor, *, without: Iterable[str]
    ) -> PreferenceBatch:
        """A host's batch.

        Args:
            batch: what the host's collator made, with or without scores.
            completion_mask: (2B, T) bool.
            without: the entries that are for the loss, and not for the model.
        """
        other = {*without, *SCORE_COLUMNS}
        inputs = {name: value for name, value in batch.items() if name not in other}
        return cls(inputs | {"use_cache": False}, completion_mask)

    def on_cpu(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token ids, the attention mask and the trained tokens, (2B, T), in one copy: here the
        device is waited for."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        ids, mask, completion_mask = torch.stack(
            [ids, mask.to(ids), self.completion_mask.to(ids)]
        ).cpu()
        return ids, mask, completion_mask.bool()

    def pairs(self) -> list[Pair]:
        """The B pairs without their padding."""
        columns = self.on_cpu()
        sides = []
        for ids, attended, completion_mask in zip(*(c.tolist() for c in columns), strict=True):
            real = [i for i, seen in enumerate(attended) if seen]
            sides.append(split_sequence([ids[i] for i in real], [completion_mask[i] for i in real]))
        half = len(sides) // 2
        return [Pair(*of_pair) for of_pair in zip(sides[:half], sides[half:], strict=True)]
