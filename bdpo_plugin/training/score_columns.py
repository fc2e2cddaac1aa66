"""Scores as columns of datasets and of batches: put in, carried, read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.objective import BalanceWeights
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOError

#: What scoring adds to each row of a dataset, and so to each batch.
SCORE_COLUMNS = (
    "bdpo_ref_chosen_logps",
    "bdpo_ref_rejected_logps",
    "bdpo_mi_chosen",
    "bdpo_mi_rejected",
    "bdpo_weight_chosen",
    "bdpo_weight_rejected",
    "bdpo_scale",
)
#: The number of a row in the dataset that the trainer was given.
ROW = "bdpo_row"
#: What the user knows a row by where the host does not keep the order: its number in the file, and
#: the file where there are several. Text.
FILE_ROW = "bdpo_file_row"
#: Tokens of the longer sequence of a pair, by which the hosts group pairs of similar length.
LENGTH = "bdpo_length"


def score_columns(scores: PairScores, weights: BalanceWeights) -> dict[str, Tensor]:
    """:data:`SCORE_COLUMNS` of B pairs, each (B,) float32."""
    columns = (
        scores.ref_chosen_logps,
        scores.ref_rejected_logps,
        scores.mi_chosen,
        scores.mi_rejected,
        *weights,
    )
    return dict(zip(SCORE_COLUMNS, columns, strict=True))


def longest(pairs: Sequence[Pair]) -> Tensor:
    """(B,) tokens of the longer sequence of each pair."""
    lengths = [
        max(len(side.prompt_ids) + len(side.completion_ids) for side in pair) for pair in pairs
    ]
    return torch.tensor(lengths, dtype=torch.long)


def with_columns(dataset: Dataset, columns: Mapping[str, Tensor]) -> Dataset:
    """The dataset with the columns, each (rows,), which take the place of any so named."""
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    new = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    return concatenate_datasets([dataset, new], axis=1)


class ScoreCollator:
    """The host's collator, with the :data:`SCORE_COLUMNS` of the rows.

    Each is a (B,) tensor of the bits of a float32, as int32: under DeepSpeed, transformers casts
    the floats of a batch to the training dtype, and a log-probability in bfloat16 is off by up to
    a nat. :func:`batch_scores` reads them.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for column in SCORE_COLUMNS:
            if column in examples[0]:
                values = torch.tensor([e[column] for e in examples], dtype=torch.float32)
                batch[column] = values.view(torch.int32)
        return batch


def batch_scores(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """:data:`SCORE_COLUMNS` that a batch of a :class:`ScoreCollator` brings along, each (B,).

    Raises:
        BDPOError: one is missing.
    """
    missing = [column for column in SCORE_COLUMNS if column not in batch]
    if missing:
        raise unscored(f"The batch has no {', '.join(missing)}: it")
    return {column: batch[column].view(torch.float32) for column in SCORE_COLUMNS}


def unscored(what: str) -> BDPOError:
    """Of data that this run has not scored."""
    return BDPOError(
        f"{what} does not come from a dataset that was scored by this trainer. Pass datasets to "
        "the trainer's constructor or to evaluate(), and do not change them afterwards; or set "
        "`bdpo_precompute: false`."
    )
