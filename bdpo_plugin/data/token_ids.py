"""Reads the token ids of a tokenised dataset from Arrow, a block of rows at a time. The hosts use
it to build pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_BLOCK = 1000


def token_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields for each row the (n,) int64 token ids of each column, as read-only views without a
    copy."""
    for block in dataset.select_columns(list(columns)).with_format("arrow").iter(_BLOCK):
        yield from zip(*(_arrays(block[column]) for column in columns), strict=True)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks().cast(pa.large_list(pa.int64()))
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    return np.split(lists.flatten().to_numpy(), ends[:-1])
