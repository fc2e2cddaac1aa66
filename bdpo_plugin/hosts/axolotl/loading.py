"""Wraps Axolotl's functions that load preference data, for B-DPO runs only.

Each row keeps the name by which the user can find it, in the column
:data:`~bdpo_plugin.training.score_columns.FILE_ROW`, through filtering, shuffling, deduplication
and Axolotl's folder of prepared data. A B-DPO run never shares that folder with a plain DPO run,
whose rows have not been checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from axolotl.utils.data import utils
from axolotl.utils.data.shared import get_dataset_type
from datasets import Dataset, DatasetDict, ReadInstruction

from bdpo_plugin.data.files import json_problem
from bdpo_plugin.hosts.axolotl.entries import NAME, written_entries_restored
from bdpo_plugin.hosts.axolotl.rewrite_config import MARK
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.score_columns import FILE_ROW

#: Increased when the preparation of the data changes, so that data prepared before is not reused.
_PREPARATION = 1
#: Suffixes of file names, with which no name of a dataset on the hub ends.
_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".gz", ".zst")


def wrap_loading(module: ModuleType) -> None:
    """Wraps the functions of `axolotl.utils.data.rl`, unless they are wrapped already."""
    from bdpo_plugin.hosts.axolotl.raw_rows import map_dataset

    wrap(module, "_load_or_create_dataset_split", _load_or_create_dataset_split)
    wrap(module, "generate_dataset_hash_from_config", _generate_dataset_hash)
    wrap(module, "load_dataset_with_config", _load_dataset_with_config)
    wrap(module, "_map_dataset", map_dataset)
    wrap(utils, "_deduplicate_dataset", _deduplicate_dataset)


def _load_or_create_dataset_split(call: Call, given: Arguments) -> Any:
    cfg = given["cfg"]
    if not cfg.get(MARK):
        return call()
    if given["split"] == "train":
        for place in ("datasets", "test_datasets"):
            for number, entry in enumerate(cfg.get(place) or []):
                _check_there(f"{place}[{number}].path", str(entry.path))
    with written_entries_restored(cfg, given["split"]):
        dataset = call()
        if not len(dataset):
            raise _all_too_long(cfg)
    return dataset


def _all_too_long(cfg: Any) -> BDPOError:
    """Returns the error for data of which Axolotl's length filter drops every row."""
    paths = ", ".join(str(entry.path) for entry in cfg.datasets)
    if str(cfg.excess_length_strategy).lower() == "truncate":
        words, remedy = "The prompt of every row", ""
    else:
        words = "Every row"
        remedy = ", or have the responses cut by `excess_length_strategy: truncate`"
    return BDPOError(
        f"{words} of {paths} is longer than `sequence_len: {cfg.sequence_len}` tokens, and Axolotl "
        f"drops it. Raise `sequence_len`{remedy}."
    )


def _generate_dataset_hash(call: Call, given: Arguments) -> Any:
    theirs = call()
    cfg = given["cfg"]
    if not cfg.get(MARK):
        return theirs
    # Axolotl's hash is the same for both strategies
    text = f"B-DPO {_PREPARATION} {cfg.excess_length_strategy or 'drop'} {theirs}"
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _load_dataset_with_config(call: Call, given: Arguments) -> Any:
    entry = given["dataset_config"]
    if NAME not in entry:
        return call()
    try:
        loaded = call()
    except BDPOError:
        raise
    except Exception as error:  # the readers of the file formats can raise anything
        raise _not_loaded(entry, error) from error
    if isinstance(loaded, DatasetDict):
        return DatasetDict({key: _with_rows(part, entry[NAME]) for key, part in loaded.items()})
    return _with_rows(loaded, entry[NAME])


def _with_rows(dataset: Dataset, name: str) -> Dataset:
    """Adds the column that names each row for messages.

    The name is the row's number in the file, counted from 0, and the file if there are several."""
    if FILE_ROW in dataset.column_names:  # prepared by an earlier run
        return dataset
    words = f" of {name}" if name else ""
    return dataset.add_column(FILE_ROW, [f"{row}{words}" for row in _numbers(dataset)])


def _numbers(dataset: Dataset) -> Iterator[int]:
    """Returns the row numbers in the file. The dataset may be a part of it (``train[:100]``)."""
    lengths = {name: split.num_examples for name, split in (dataset.info.splits or {}).items()}
    try:
        parts = ReadInstruction.from_spec(str(dataset.split)).to_absolute(lengths)
    except (AssertionError, ValueError):  # the name of the split does not describe a part
        parts = []
    ranges = [range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
              for part in parts]  # fmt: skip
    if sum(map(len, ranges)) == len(dataset):
        return (number for numbers in ranges for number in numbers)
    return iter(range(len(dataset)))


def _deduplicate_dataset(call: Call, given: Arguments) -> Any:
    """Deduplicates without the column of row numbers, in which all rows differ."""
    if FILE_ROW in given["dataset"].column_names:
        given["dataset"] = _Unnumbered(given["dataset"])
    return call()


class _Unnumbered:
    """Iterates over the rows of a dataset without their numbers. A selection keeps the numbers."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._dataset.remove_columns(FILE_ROW))

    def select(self, indices: list[int]) -> Dataset:
        return self._dataset.select(indices)


# What cannot be loaded ------------------------------------------------------------------------


def _check_there(key: str, value: str) -> None:
    """Checks that the path of a local file exists and that the file is not empty."""
    path = Path(value)
    local = "://" not in value and (value.startswith((".", "/", "~")) or value.endswith(_FILES))
    if local and not path.exists():
        raise BDPOError(
            f"`{key}: {value}`: there is no such file or folder. (The path is seen from the folder "
            f"in which the command was called, {Path.cwd()}.)"
        )
    if path.is_file() and not path.stat().st_size:
        raise BDPOError(f"`{key}: {value}` is an empty file. Nothing has been trained.")


def _not_loaded(entry: Any, error: Exception) -> BDPOError:
    """Returns the error for an entry that Axolotl or the package datasets failed to load."""
    path = Path(str(entry.path))
    is_json = path.is_file() and get_dataset_type(entry) == "json"
    if is_json and (problem := json_problem(path)):
        return BDPOError(f"`{path}`: {problem}. Nothing has been trained.")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    told = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    keys = ("path", "name", "split", "ds_type", "data_files", "revision")
    said = ", ".join(f"{key}: {entry[key]}" for key in keys if entry.get(key))
    return BDPOError(f"The dataset `{said}` cannot be loaded: {told}")
