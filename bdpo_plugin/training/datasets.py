"""Selects the pairs of a dataset that can be trained on, and keeps track of the datasets that a
trainer has prepared. The trainer mixin and the trainers of the hosts call it.

Training and evaluation use only datasets that this trainer has prepared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from bdpo_plugin.data.pairs import Pair, check_pairs, is_blank
from bdpo_plugin.output.tables import print_problems
from bdpo_plugin.settings import PREFIX, BDPOError
from bdpo_plugin.training.checkpoints import DATE, PAIRS, UNDATED
from bdpo_plugin.training.score_columns import FILE_ROW
from bdpo_plugin.training.template_dates import TemplateDates

#: The columns that TRL's own precomputation adds to a dataset, and that its collator passes on.
TRL_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Tokenised:
    """The B pairs of a host's tokenised dataset, as training uses them.

    Attributes:
        pairs: the pairs after truncation.
        lengths: the numbers of response tokens (chosen, rejected) of each pair before truncation.
        prompt_boundary_mismatch: the positions of the pairs whose prompt is known not to end where
            the response begins.
        rows: the row numbers of the pairs in the dataset that the trainer was given.
        names: the names by which the user knows the pairs; None if these are the row numbers.
    """

    pairs: Sequence[Pair]
    lengths: Sequence[tuple[int, int]]
    prompt_boundary_mismatch: Sequence[int]
    rows: Sequence[int]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Usable:
    """The B rows of a dataset that can be trained on.

    Attributes:
        name: the name of the dataset, for messages.
        dataset: the host's tokenised dataset, without the rows that cannot be trained on.
        pairs: the pairs of its rows.
        rows: the row numbers of the pairs in the user's dataset.
        groups: for each pair the value of the column that `bdpo_control` names; None if it names no
            column.
        columns: the columns of the data that the argument `weigh` asks for.
    """

    name: str
    dataset: Dataset
    pairs: Sequence[Pair]
    rows: Sequence[int]
    groups: Sequence[str] | None
    columns: Mapping[str, Sequence[Any]]


def usable_rows(
    dataset: Dataset,
    tokenised: Tokenised,
    name: str,
    *,
    tokenizer: Any,
    control_column: str | None,
    asked: Sequence[str],
    main: bool,
) -> Usable:
    """Selects the rows of a dataset that can be trained on, and prints the problems of the others.

    Raises:
        BDPOError: No pair is left, or the dataset has no such column.
    """
    check_control_column(control_column, dataset.column_names, name)
    if missing := [column for column in asked if column not in dataset.column_names]:
        raise BDPOError(
            f"The `weigh` callable asks for {', '.join(missing)}, which the {name} data does not "
            f"have, only {', '.join(dataset.column_names)}. Its keyword-only arguments name "
            "columns that the training data and all evaluation data have."
        )
    report = check_pairs(
        tokenised.pairs,
        name,
        lengths=tokenised.lengths,
        bos=tokenizer.bos_token_id,
        prompt_boundary_mismatch=tokenised.prompt_boundary_mismatch,
        is_blank=partial(is_blank, tokenizer),
        numbers=tokenised.names or tokenised.rows,
    )
    if main:
        print_problems(report.lines())
    report.raise_if_nothing_left()
    dropped = report.dropped
    kept = [place for place in range(report.total) if place not in dropped]
    if dropped:
        dataset = dataset.select(kept)
    return Usable(
        name,
        dataset,
        [tokenised.pairs[place] for place in kept],
        [tokenised.rows[place] for place in kept],
        [str(value) for value in dataset[control_column]] if control_column else None,
        {column: list(dataset[column]) for column in asked},
    )


def check_control_column(column: str | None, columns: Sequence[str], name: str) -> None:
    """Checks that a dataset has the column that `bdpo_control` names.

    Args:
        columns: the columns of the dataset that are kept until it is scored.

    Raises:
        BDPOError: The dataset does not have the column.
    """
    if column is not None and column not in columns:
        raise BDPOError(
            f"`bdpo_control: shuffled:{column}`: the {name} data has no column `{column}`, only "
            f"{', '.join(columns)}. Name a column that the training data and all evaluation data "
            "have, or shuffle among all pairs: `bdpo_control: shuffled`."
        )


def digest(pairs: Sequence[Pair]) -> str:
    """Computes a digest of the pairs, by content and order: 32 hexadecimal digits."""
    return _digest(ids.tobytes() for pair in pairs for side in pair for ids in side)


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def description_of(
    pairs: Sequence[Pair], tokenizer: Any, dates: TemplateDates | None
) -> dict[str, str]:
    """Describes the training pairs for the checkpoints of a run."""
    described = {PAIRS: digest(pairs)}
    if dates is None:
        return described

    def parts() -> Iterator[bytes]:
        for pair in pairs:
            for prompt, response in pair:
                text = str(tokenizer.decode(prompt))
                if DATE not in described and (date := dates.first(text)):
                    described[DATE] = date
                yield dates.without(text).encode(errors="replace")
                yield response.tobytes()

    described[UNDATED] = _digest(parts())
    return described


class ReadyDatasets:
    """The datasets that a trainer has scored or checked itself, identified by content, and its
    streams.

    A dataset that was changed afterwards, or scored by another trainer, is not among them, even if
    it has the same columns.
    """

    def __init__(self) -> None:
        self._fingerprints: set[str] = set()
        self._streams: list[Any] = []

    def add(self, dataset: Any) -> Any:
        """Adds a dataset and returns it."""
        if isinstance(dataset, Dataset):
            self._fingerprints.add(dataset._fingerprint)
        else:
            self._streams.append(dataset)
        return dataset

    def __contains__(self, dataset: Any) -> bool:
        if isinstance(dataset, Dataset):
            return dataset._fingerprint in self._fingerprints
        return any(dataset is stream for stream in self._streams)


def is_reserved(column: str) -> bool:
    """Whether a column has the name of a result of a run."""
    ours = column.startswith(PREFIX) and column != FILE_ROW
    return ours or column in TRL_COLUMNS


def drop_reserved(dataset: Any, name: str, *, main: bool) -> Any:
    """Removes the columns of a dataset or stream that could be mistaken for results of this run."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    found = list(filter(is_reserved, columns))
    if not found:
        return dataset
    if main:
        print_problems(
            [
                f"the {name} data has columns named as results of a run: {', '.join(found)}. They "
                "are left out: B-DPO computes its own (to use your own weights, see the trainer's "
                "argument `weigh`)"
            ]
        )
    return dataset.remove_columns(found)


def peek(stream: IterableDataset, name: str, columns: Sequence[str]) -> Dataset:
    """Returns the first rows of a stream, from which the null prompt is derived.

    Raises:
        BDPOError: The stream has no rows.
    """
    rows = [{column: row[column] for column in columns} for row in stream.take(256)]
    if not rows:
        raise nothing_left(name)
    return Dataset.from_list(rows)


def nothing_left(name: str) -> BDPOError:
    """Returns the error for a stream without pairs that can be trained on."""
    return BDPOError(
        f"No pair of the {name} data, a stream, can be trained on: see the problems reported above."
    )


def stream_refusal(name: str) -> BDPOError:
    """Returns the error for a stream that would have to be scored before training."""
    return BDPOError(
        f"The {name} data is a stream, which cannot be scored before training: set "
        "`bdpo_precompute: false`."
    )
