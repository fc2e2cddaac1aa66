"""Reads LLaMA-Factory's tokenised pairwise datasets and their batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from llamafactory.extras.constants import IGNORE_INDEX

from bdpo_plugin.data.pairs import Pair, split_sequence
from bdpo_plugin.data.token_ids import token_rows
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.batch import PreferenceBatch

_MEDIA = ("images", "videos", "audios")
_SIDES = ("chosen", "rejected")
#: The columns of LLaMA-Factory's tokenised rows that are read here.
TOKENISED = tuple(f"{side}_{part}" for side in _SIDES for part in ("input_ids", "labels"))
#: Placeholder for the response lengths before truncation, which LLaMA-Factory does not keep. Every
#: template ends a response with a token, so an empty response must have been truncated.
BEFORE = (1, 1)


def check_collator(collator: Any) -> None:
    """Raises BDPOError if the collator of a run makes batches that B-DPO cannot honour."""
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


def written_dates(template: Any) -> tuple[str, ...]:
    """Returns the formats of the dates that LLaMA-Factory itself writes into prompts.

    It does so with the template of Llama 3, in rows that have tools."""
    llama = getattr(template.format_tools, "tool_format", None) == "llama3"
    return ("%d %b %Y",) if llama else ()


def dataset_pairs(dataset: Dataset, name: str) -> list[Pair]:
    """Returns all pairs of a tokenised dataset, which LLaMA-Factory has truncated already.

    Raises:
        BDPOError: a row has an image, a video or a sound.
    """
    if media := [column for column in _MEDIA if column in dataset.column_names]:
        _refuse_media(dataset.select_columns(media), name)
    rows = token_rows(dataset, TOKENISED)
    return [row_pair(dict(zip(TOKENISED, row, strict=True))) for row in rows]


def _refuse_media(dataset: Dataset, name: str) -> None:
    start = 0
    for rows in dataset.iter(batch_size=256):
        for column, values in rows.items():
            if found := [row for row, value in enumerate(values) if value]:
                raise BDPOError(
                    f"Row {start + found[0]} of the {name} data has {column}: B-DPO measures "
                    "the mutual information of text with text. Remove such rows."
                )
        start += len(values)


def stream_pair(row: Mapping[str, Any], name: str) -> tuple[Pair, tuple[int, int]]:
    """Returns the pair of a row of a tokenised stream, and :data:`BEFORE` as its lengths.

    Raises:
        BDPOError: the row has an image, a video or a sound.
    """
    for column in _MEDIA:
        if row.get(column):
            raise BDPOError(
                f"A row of the {name} data, a stream, has {column}: B-DPO measures the mutual "
                "information of text with text. Filter such rows out."
            )
    return row_pair(row), BEFORE


def tokenised_row(processor: Any, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Tokenises an aligned row with LLaMA-Factory's processor. None if that drops it."""
    made = processor.preprocess_dataset({column: [value] for column, value in row.items()})
    return {column: value[0] for column, value in made.items()} if made else None


def row_pair(row: Mapping[str, Any]) -> Pair:
    """Returns the pair of a tokenised row."""
    return Pair(
        *(
            split_sequence(
                row[f"{side}_input_ids"],
                np.asarray(row[f"{side}_labels"]) != IGNORE_INDEX,
            )
            for side in _SIDES
        )
    )


def preference_batch(batch: Mapping[str, Any]) -> PreferenceBatch:
    """Converts a batch of LLaMA-Factory's pairwise collator, whose `labels` are (2B, T)."""
    return PreferenceBatch.of(batch, batch["labels"] != IGNORE_INDEX, without=("labels",))
