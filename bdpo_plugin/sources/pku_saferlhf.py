"""PKU-SafeRLHF (Ji et al., arXiv 2406.15513): the training set of the paper's experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import Pair, pair_of
from bdpo_plugin.sources.loading import load_train
from bdpo_plugin.sources.selection import Sorted

HUB = "PKU-Alignment/PKU-SafeRLHF"
COLUMNS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)


def load_rows(data: str = HUB, revision: str | None = None) -> Iterable[Mapping[str, Any]]:
    """Loads the rows of a JSON or JSONL file, or of the split ``train`` of a dataset on the hub.

    Raises:
        BDPOError: the data cannot be loaded, or lacks a column of :data:`COLUMNS`.
    """
    source: dict[str, Any] = {"revision": revision}
    if Path(data).is_file():
        source = {"path": "json", "data_files": data}
    rows = load_train("--data", data, files="a JSON or JSONL file", **source)
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise BDPOError(
            f"{data} has no column {', '.join(missing)}. Its columns have to be those of "
            f"{HUB}: {', '.join(COLUMNS)}."
        )
    selected: Iterable[Mapping[str, Any]] = rows.select_columns(list(COLUMNS))
    return selected


def sort(rows: Iterable[Mapping[str, Any]]) -> Iterator[Sorted]:
    """Yields the label and the pair of each row, or the reason why the row is skipped.

    ``unsafe``: one of the two responses is safe; it is chosen. ``safe``: both are safe; the better
    one is chosen.
    """
    for row in rows:
        yield choose(row)


def choose(row: Mapping[str, Any]) -> Sorted:
    """Sorts one row, see :func:`sort`. The pair records whether its rejected response is safe."""
    safe = [bool(row["is_response_0_safe"]), bool(row["is_response_1_safe"])]
    texts = [(row[f"response_{i}"] or "").strip() for i in (0, 1)]
    if not (row["prompt"] or "").strip() or not all(texts):
        return "prompt or response empty", None
    if texts[0] == texts[1]:
        return "identical responses", None
    if safe == [False, False]:
        return "both responses unsafe", None
    chosen = row["better_response_id" if all(safe) else "safer_response_id"]
    if chosen not in (0, 1) or not safe[chosen]:
        return "labels contradict each other", None
    label = "safe" if all(safe) else "unsafe"
    pair: Pair = pair_of(row["prompt"].strip(), texts[chosen], texts[1 - chosen])
    return label, {"label": label, **pair, "rejected_safe": safe[1 - chosen]}
