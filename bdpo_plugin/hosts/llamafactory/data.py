"""LLaMA-Factory's tokenised pairwise datasets and their batches, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from llamafactory.extras.constants import IGNORE_INDEX

from bdpo_plugin.reference.pairs import Pair, split_sequence
from bdpo_plugin.settings import BDPOError

_MEDIA = ("images", "videos", "audios")
_SIDES = ("chosen", "rejected")


def check_collator(collator: Any) -> None:
    """Raise BDPOError if the collator of a run makes batches that B-DPO cannot honour."""
    if collator.label_pad_token_id != IGNORE_INDEX:
        raise BDPOError(
            "`ignore_pad_token_for_loss: false` cannot be used with `pref_loss: bdpo`: it trains "
            "on the padding, which is not part of a response. Remove it."
        )
    plugin = collator.template.mm_plugin
    if plugin.image_token or plugin.video_token or plugin.audio_token:
        raise BDPOError(
            "The template of this run is that of a multimodal model, whose batches have images or "
            "sounds even where the data has none: B-DPO measures the mutual information of text "
            "with text. Use a text model and its template."
        )


def dataset_pairs(dataset: Dataset, name: str) -> list[Pair]:
    """All pairs of a tokenised dataset; LLaMA-Factory has truncated it already.

    Raises:
        BDPOError: a row has an image, a video or a sound.
    """
    columns = [f"{side}_{part}" for side in _SIDES for part in ("input_ids", "labels")]
    media = [column for column in _MEDIA if column in dataset.column_names]
    pairs: list[Pair] = []
    for rows in dataset.select_columns([*columns, *media]).iter(batch_size=256):
        for column in media:
            if found := [row for row, value in enumerate(rows[column]) if value]:
                raise BDPOError(
                    f"Row {len(pairs) + found[0]} of the {name} data has {column}: B-DPO measures "
                    "the mutual information of text with text. Remove such rows."
                )
        sides = [
            [
                split_sequence(ids, [label != IGNORE_INDEX for label in labels])
                for ids, labels in zip(
                    rows[f"{side}_input_ids"], rows[f"{side}_labels"], strict=True
                )
            ]
            for side in _SIDES
        ]
        pairs += [Pair(*pair) for pair in zip(*sides, strict=True)]
    return pairs


def batch_as_trl(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with TRL's `completion_mask`, (2B, T), in the place of `labels`."""
    other = {key: value for key, value in batch.items() if key != "labels"}
    return {**other, "completion_mask": batch["labels"] != IGNORE_INDEX}
