"""The datasets of a run: their useless pairs dropped, and what each batch needs added.

All of them are looked at before the first is scored, so that a run does not stop after its pass at
what could be seen before. Only what this very trainer has prepared is trained on or evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from bdpo_plugin.data.pairs import Pair, check_pairs
from bdpo_plugin.output.score_file import score_file
from bdpo_plugin.output.tables import print_problems
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.settings import PREFIX, BDPOError
from bdpo_plugin.training.checkpoints import DATE, PAIRS, UNDATED
from bdpo_plugin.training.score_columns import FILE_ROW, LENGTH, longest, with_columns
from bdpo_plugin.training.scorer import Scorer, is_blank
from bdpo_plugin.training.template_dates import TemplateDates

#: What TRL's own precomputation adds to a dataset, and its collator hands on.
TRL_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Tokenised:
    """A host's tokenised dataset, read: B pairs, as training will see them.

    Attributes:
        pairs: after truncation.
        lengths: response tokens (chosen, rejected) of each pair before truncation.
        prompt_boundary_mismatch: positions whose prompt is known not to end where the response
            begins.
        rows: the numbers of the pairs in the dataset that the trainer was given.
        names: what the user knows the pairs by, where that is something else.
    """

    pairs: Sequence[Pair]
    lengths: Sequence[tuple[int, int]]
    prompt_boundary_mismatch: Sequence[int]
    rows: Sequence[int]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Usable:
    """The rows of a dataset that can be trained on: B pairs.

    Attributes:
        name: of the dataset, for the user.
        dataset: of the host, tokenised, without the other rows.
        pairs: the same, read.
        rows: the numbers of the pairs in the user's dataset.
        groups: of each pair, the value of the column that `bdpo_control` names, if it names one.
    """

    name: str
    dataset: Dataset
    pairs: Sequence[Pair]
    rows: Sequence[int]
    groups: Sequence[str] | None


def usable_rows(
    dataset: Dataset,
    tokenised: Tokenised,
    name: str,
    *,
    tokenizer: Any,
    control_column: str | None,
    main: bool,
) -> Usable:
    """The rows of a dataset that can be trained on; what is wrong with the others is printed.

    Args:
        dataset: of a host, tokenised.
        tokenised: the same, read.
        name: of the dataset, for the user.
        tokenizer: of the run.
        control_column: that `bdpo_control` names, if it names one.
        main: whether this process is the one that tells the user.

    Raises:
        BDPOError: no pair is left, or there is no such column.
    """
    check_control_column(control_column, dataset.column_names, name)
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
    )


def with_scores(
    usable: Usable,
    scorer: Scorer,
    reference: Callable[[], Reference] | None,
    *,
    train: bool = False,
    later: bool = False,
) -> Dataset:
    """A dataset with what each batch needs.

    Args:
        usable: its rows.
        scorer: of the run.
        reference: of the run; None where each batch is scored in its step.
        train: whether these are the pairs that are trained on.
        later: whether the dataset was given after the trainer was made, when it may have the name
            of another.

    Raises:
        BDPOError: the reference cannot score a pair.
    """
    columns = {LENGTH: longest(usable.pairs)}
    if reference is not None:
        content = digest(usable.pairs) if later else ""
        file = score_file("" if train else usable.name, content)
        columns |= scorer.score_dataset(
            usable.pairs, usable.rows, usable.name, reference(), file, usable.groups
        )
    return with_columns(usable.dataset, columns)


def check_control_column(column: str | None, columns: Sequence[str], name: str) -> None:
    """Refuse a column that `bdpo_control` names and a dataset does not have.

    Args:
        column: that it names, if it names one.
        columns: those of the dataset that last until it is scored.
        name: of the dataset, for the user.
    """
    if column is not None and column not in columns:
        raise BDPOError(
            f"`bdpo_control: shuffled:{column}`: the {name} data has no column `{column}`, only "
            f"{', '.join(columns)}. Name a column that the training data and all evaluation data "
            "have, or shuffle among all pairs: `bdpo_control: shuffled`."
        )


def digest(pairs: Sequence[Pair]) -> str:
    """What the pairs are, by content and order, in 32 hexadecimal digits."""
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
    """What a checkpoint says of the pairs that it was trained on.

    Args:
        pairs: of the training data.
        tokenizer: of the run.
        dates: that its chat template writes into the prompts.
    """
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


def is_reserved(column: str) -> bool:
    """Whether a column is named as a result of a run."""
    ours = column.startswith(PREFIX) and column != FILE_ROW
    return ours or column in TRL_COLUMNS


def drop_reserved(dataset: Any, name: str, *, main: bool) -> Any:
    """The dataset, or stream, without the columns that could be taken for results.

    Args:
        dataset: as it was given.
        name: of the dataset, for the user.
        main: whether this process is the one that tells the user.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    found = list(filter(is_reserved, columns))
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
