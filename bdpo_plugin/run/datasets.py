"""The datasets of a run: made ready for training, and known again.

A dataset is ready once its useless pairs are dropped and it has what each batch needs. Only what
was made ready by this very trainer is trained on or evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from bdpo_plugin.pairs import Pair, check_pairs
from bdpo_plugin.reference.reference import Reference
from bdpo_plugin.run.columns import LENGTH, longest, with_columns
from bdpo_plugin.run.report import print_problems, score_file
from bdpo_plugin.run.scorer import Scorer, is_blank
from bdpo_plugin.settings import PREFIX, BDPOError

#: What TRL's own precomputation adds to a dataset, and its collator hands on.
TRL_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Tokenised:
    """A host's tokenised dataset, read: B pairs, as training will see them.

    Attributes:
        pairs: after truncation.
        lengths: response tokens (chosen, rejected) of each pair before truncation.
        misplaced: positions whose prompt is known not to end where the response begins.
        rows: the numbers of the pairs in the user's dataset.
    """

    pairs: Sequence[Pair]
    lengths: Sequence[tuple[int, int]]
    misplaced: Sequence[int]
    rows: Sequence[int]


def prepare(
    dataset: Dataset,
    tokenised: Tokenised,
    name: str,
    *,
    tokenizer: Any,
    settle: Callable[[Sequence[Pair]], Scorer],
    reference: Callable[[], Reference] | None,
    main: bool,
    train: bool = False,
    later: bool = False,
) -> Dataset:
    """The usable rows of a dataset, with their scores where they are computed in advance.

    Args:
        dataset: of a host, tokenised.
        tokenised: the same, read.
        name: of the dataset, for the user.
        tokenizer: of the run.
        settle: the scorer of the run, whose null prompt the first usable pairs settle.
        reference: of the run; None where each batch is scored in its step.
        main: whether this process is the one that tells the user.
        train: whether these are the pairs that are trained on.
        later: whether the dataset was given after the trainer was made, when it may have the name
            of another.

    Raises:
        BDPOError: no pair is left, or the reference cannot score one.
    """
    report = check_pairs(
        tokenised.pairs,
        name,
        lengths=tokenised.lengths,
        bos=tokenizer.bos_token_id,
        misplaced=tokenised.misplaced,
        is_blank=partial(is_blank, tokenizer),
        numbers=tokenised.rows,
    )
    if main:
        print_problems(report.lines())
    report.raise_if_nothing_left()
    dropped = report.dropped
    kept = [place for place in range(report.total) if place not in dropped]
    if dropped:
        dataset = dataset.select(kept)
    pairs = [tokenised.pairs[place] for place in kept]
    rows = [tokenised.rows[place] for place in kept]
    scorer = settle(pairs)
    content = digest(pairs) if train or later else ""
    if train:
        scorer.facts["training pairs"] = content
    columns = {LENGTH: longest(pairs)}
    if reference is not None:
        file = score_file("" if train else name, content if later else "")
        groups = _groups(dataset, scorer.settings.control_column, name)
        columns |= scorer.score_dataset(pairs, rows, name, reference(), file, groups)
    return with_columns(dataset, columns)


def _groups(dataset: Dataset, column: str | None, name: str) -> list[str] | None:
    """The values of the column that `bdpo_control` names, if it names one."""
    if column is None:
        return None
    if column not in dataset.column_names:
        raise BDPOError(
            f"`bdpo_control: shuffled:{column}`: the {name} data has no column `{column}` once the "
            f"host has tokenised it, only {', '.join(dataset.column_names)}. Name one of these, or "
            "shuffle among all pairs: `bdpo_control: shuffled`. (LLaMA-Factory keeps no column of "
            "the user's.)"
        )
    return [str(value) for value in dataset[column]]


def digest(pairs: Sequence[Pair]) -> str:
    """What the pairs are, by content and order, in 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        for ids in (ids for side in pair for ids in side):
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.tobytes())
    return found.hexdigest()


class ReadyDatasets:
    """The datasets that a trainer has scored or checked itself, by content, and its streams.

    A dataset that was changed, or that another trainer scored, is not among them, whatever its
    columns are called.
    """

    def __init__(self) -> None:
        self._fingerprints: set[str] = set()
        self._streams: list[Any] = []

    def add(self, dataset: Any) -> Any:
        """Take a dataset in, and give it back."""
        if isinstance(dataset, Dataset):
            self._fingerprints.add(dataset._fingerprint)
        else:
            self._streams.append(dataset)
        return dataset

    def __contains__(self, dataset: Any) -> bool:
        if isinstance(dataset, Dataset):
            return dataset._fingerprint in self._fingerprints
        return any(dataset is stream for stream in self._streams)


def drop_reserved(dataset: Any, name: str, *, main: bool) -> Any:
    """The dataset, or stream, without the columns that could be taken for results.

    Args:
        dataset: as it was given.
        name: of the dataset, for the user.
        main: whether this process is the one that tells the user.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    found = [column for column in columns if column.startswith(PREFIX) or column in TRL_COLUMNS]
    if not found:
        return dataset
    if main:
        print_problems(
            [
                f"the {name} data has columns named as results of a run: {', '.join(found)}. They "
                "are left out: B-DPO computes its own (the trainer's argument `weigh` takes "
                "weights of yours)"
            ]
        )
    return dataset.remove_columns(found)


def peek(stream: IterableDataset, name: str, columns: Sequence[str]) -> Dataset:
    """The first rows of a stream: those that the null prompt is derived from.

    Raises:
        BDPOError: it has none.
    """
    rows = [{column: row[column] for column in columns} for row in stream.take(256)]
    if not rows:
        raise nothing_left(name)
    return Dataset.from_list(rows)


def nothing_left(name: str) -> BDPOError:
    """Of a stream in which nothing can be trained on."""
    return BDPOError(
        f"No pair of the {name} data, a stream, can be trained on: see the problems told above."
    )


def stream_refusal(name: str) -> BDPOError:
    """Of a streaming dataset that was to be scored before training."""
    return BDPOError(
        f"The {name} data is a stream, which cannot be scored before training: set "
        "`bdpo_precompute: false`."
    )
