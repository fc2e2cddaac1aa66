"""LLaMA-Factory's tokenised pairwise datasets and their batches, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from llamafactory.extras.constants import IGNORE_INDEX

from bdpo_plugin.pairs import Pair, split_sequence
from bdpo_plugin.run.batch import PreferenceBatch
from bdpo_plugin.settings import BDPOError

_MEDIA = ("images", "videos", "audios")
_SIDES = ("chosen", "rejected")
#: What LLaMA-Factory's tokenisation makes of a row, as far as it is read here.
TOKENISED = tuple(f"{side}_{part}" for side in _SIDES for part in ("input_ids", "labels"))
#: Stands for the response tokens before truncation: every template ends a response with a token,
#: so that an empty one has been cut.
BEFORE = (1, 1)


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
    media = [column for column in _MEDIA if column in dataset.column_names]
    pairs: list[Pair] = []
    for rows in dataset.select_columns([*TOKENISED, *media]).iter(batch_size=256):
        for column in media:
            if found := [row for row, value in enumerate(rows[column]) if value]:
                raise BDPOError(
                    f"Row {len(pairs) + found[0]} of the {name} data has {column}: B-DPO measures "
                    "the mutual information of text with text. Remove such rows."
                )
        for values in zip(*(rows[column] for column in TOKENISED), strict=True):
            pairs.append(_pair(dict(zip(TOKENISED, values, strict=True))))
    return pairs


def stream_pair(row: Mapping[str, Any], name: str) -> tuple[Pair, tuple[int, int]]:
    """The pair of a row of a tokenised stream, and what stands for its lengths before truncation.

    Raises:
        BDPOError: the row has an image, a video or a sound.
    """
    for column in _MEDIA:
        if row.get(column):
            raise BDPOError(
                f"A row of the {name} data, a stream, has {column}: B-DPO measures the mutual "
                "information of text with text. Filter such rows out."
            )
    return _pair(row), BEFORE


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(
        *(
            split_sequence(
                row[f"{side}_input_ids"],
                [label != IGNORE_INDEX for label in row[f"{side}_labels"]],
            )
            for side in _SIDES
        )
    )


def preference_batch(batch: Mapping[str, Any]) -> PreferenceBatch:
    """A batch of LLaMA-Factory's pairwise collator, with its `labels`, (2B, T)."""
    return PreferenceBatch.of(batch, batch["labels"] != IGNORE_INDEX, without=("labels",))
