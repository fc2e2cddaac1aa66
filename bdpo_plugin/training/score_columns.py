"""Adds scores as columns to datasets, passes them through the collator, and reads them from
batches. The trainers of all hosts use it."""

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

#: The columns that scoring adds to each row of a dataset, and so to each batch.
SCORE_COLUMNS = (
    "bdpo_ref_chosen_logps",
    "bdpo_ref_rejected_logps",
    "bdpo_mi_chosen",
    "bdpo_mi_rejected",
    "bdpo_weight_chosen",
    "bdpo_weight_rejected",
    "bdpo_scale",
)
#: The column with the number of a row in the dataset that the trainer was given.
ROW = "bdpo_row"
#: The column with the name of a row for the user, if the host does not keep the order: its number
#: in the file, and the file if there are several. Text.
FILE_ROW = "bdpo_file_row"
#: The column with the number of tokens of the longer sequence of a pair, by which the hosts group
#: pairs of similar length.
LENGTH = "bdpo_length"


def score_columns(scores: PairScores, weights: BalanceWeights) -> dict[str, Tensor]:
    """Returns the :data:`SCORE_COLUMNS` of B pairs, each (B,) float32."""
    columns = (
        scores.ref_chosen_logps,
        scores.ref_rejected_logps,
        scores.mi_chosen,
        scores.mi_rejected,
        *weights,
    )
    return dict(zip(SCORE_COLUMNS, columns, strict=True))


def longest(pairs: Sequence[Pair]) -> Tensor:
    """Returns the (B,) numbers of tokens of the longer sequence of each pair."""
    lengths = [
        max(len(side.prompt_ids) + len(side.completion_ids) for side in pair) for pair in pairs
    ]
    return torch.tensor(lengths, dtype=torch.long)


def with_columns(dataset: Dataset, columns: Mapping[str, Tensor]) -> Dataset:
    """Adds columns, each (rows,), to a dataset; replaces existing columns of the same names."""
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    new = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    return concatenate_datasets([dataset, new], axis=1)


class ScoreCollator:
    """Wraps the host's collator and adds the :data:`SCORE_COLUMNS` of the rows to each batch.

    Each column is a (B,) int32 tensor with the bits of float32 values. The reason: under DeepSpeed,
    transformers casts the float tensors of a batch to the training dtype, and a log-probability in
    bfloat16 is off by up to a nat. :func:`batch_scores` reads the columns.
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
    """Reads the :data:`SCORE_COLUMNS`, each (B,) float32, from a batch of a
    :class:`ScoreCollator`.

    Raises:
        BDPOError: A column is missing.
    """
    missing = [column for column in SCORE_COLUMNS if column not in batch]
    if missing:
        raise unscored(f"The batch has no {', '.join(missing)}: it")
    return {column: batch[column].view(torch.float32) for column in SCORE_COLUMNS}


def unscored(what: str) -> BDPOError:
    """Returns the error for data that this trainer has not scored."""
    return BDPOError(
        f"{what} does not come from a dataset that was scored by this trainer. Pass datasets to "
        "the trainer's constructor or to evaluate(), and do not change them afterwards; or set "
        "`bdpo_precompute: false`."
    )
