"""Checks the datasets that TRL's trainer is given, before TRL reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt

from bdpo_plugin.data.pairs import DataReport
from bdpo_plugin.data.raw_rows import Problem, RowCheck, RowReport, raise_problems, raise_row
from bdpo_plugin.hosts.trl.tokenised import READ, rendered
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.training.datasets import check_control_column, is_reserved, stream_refusal
from bdpo_plugin.training.score_columns import FILE_ROW, ROW

#: Columns that may mislead TRL when it distinguishes text from conversations. It reads them for
#: nothing else.
_MISLEADING = ("messages", "completion")

_UNREADABLE = "If these are all rows, choose another chat template; else change or remove them."


def given_arguments(rest: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the trainer's arguments that follow `args`, by name."""
    names = ("data_collator", "train_dataset", "eval_dataset", "processing_class")
    return {**dict(zip(names, rest, strict=False)), **kwargs}


def given_datasets(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the datasets among a trainer's arguments, each with its name."""
    evaluation = given.get("eval_dataset")
    if not isinstance(evaluation, dict):
        evaluation = {} if evaluation is None else {"eval": evaluation}
    return [("train", given.get("train_dataset")), *evaluation.items()]


def check_datasets(
    datasets: Iterable[tuple[str, Any]], tokenizer: Any, pad_token: str | None
) -> dict[int, list[int]]:
    """Checks that TRL can read the datasets, and reports all their problems in one message.

    Only the existence of a first row is checked in a stream: see :func:`checked_stream`.

    Args:
        datasets: each dataset with its name.
        tokenizer: the tokenizer of the run, or None if TRL will load it.
        pad_token: the padding token in the training arguments.

    Returns:
        The positions of rows in which a response has no message, by the id of the dataset.

    Raises:
        BDPOError: TRL cannot read the data. The message lists the rows, what is wrong with them and
            what to do.
    """
    reports, empty = [], {}
    for name, dataset in datasets:
        report = RowReport(name, numbers=_file_rows(dataset))
        reports.append(report)
        report.general += _general_problems(dataset, tokenizer, pad_token)
        if isinstance(dataset, Dataset) and len(dataset):
            empty[id(dataset)] = _check_rows(dataset, report, tokenizer)
    raise_problems(reports)
    return empty


def check_scorable(datasets: Iterable[tuple[str, Any]], settings: BDPOSettings) -> None:
    """Checks that the datasets can be scored before training, if the settings ask for it.

    Args:
        datasets: each dataset with its name.
        settings: the settings of the run.

    Raises:
        BDPOError: a dataset is a stream, or lacks the column that `bdpo_control` names.
    """
    for name, dataset in datasets:
        if isinstance(dataset, IterableDataset) and settings.precompute:
            raise stream_refusal(name)
        if isinstance(dataset, Dataset):
            kept = [c for c in dataset.column_names if not (is_reserved(c) or c in _MISLEADING)]
            check_control_column(settings.control_column, kept, name)


def _file_rows(dataset: Any) -> Sequence[str] | None:
    """Returns the names that the host gave to the rows of a dataset, or None."""
    if isinstance(dataset, Dataset) and FILE_ROW in dataset.column_names:
        return list(dataset[FILE_ROW])
    return None


def _general_problems(dataset: Any, tokenizer: Any, pad_token: str | None) -> Iterator[str]:
    if not isinstance(dataset, Dataset | IterableDataset):
        remedy = "make a dataset of it, with datasets.Dataset.from_list say"
        if isinstance(dataset, dict):
            remedy = "choose one of its splits"
        yield f"It is of type {type(dataset).__name__}: {remedy}."
        return
    first = next(iter(dataset), None)
    if first is None:
        yield "It has no rows. Give it some, or leave it out."
        return
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer
    if tokenizer is None or tokenizer.eos_token is not None:
        return
    if isinstance(first.get("chosen"), str):
        yield (
            "The tokenizer has no EOS token, by which a response that is text ends: set "
            "`tokenizer.eos_token` (Axolotl: `special_tokens: {eos_token: ...}`)."
        )
    elif tokenizer.pad_token is None and pad_token is None:
        yield (
            "The tokenizer has neither a padding token nor an EOS token to pad with: set "
            "`tokenizer.pad_token` (Axolotl: `special_tokens: {pad_token: ...}`)."
        )


def _check_rows(dataset: Dataset, report: RowReport, tokenizer: Any) -> list[int]:
    """Adds problems to `report`. Returns the rows in which a response has no message."""
    check = RowCheck(partial(reads_parts, tokenizer))
    empty = []
    for number, row in enumerate(_rows(dataset)):
        report.total += 1
        if problems := check(row):
            report.add(number, problems)
        elif not (row["chosen"] and row["rejected"]) and isinstance(row["chosen"], list):
            empty.append(number)
    return empty


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yields the rows as TRL will see them, without columns that it does not read."""
    custom = dataset.format["type"] == "custom"  # its function may read any column
    if not custom and {"chosen", "rejected"} <= set(dataset.column_names):
        dataset = dataset.select_columns([c for c in dataset.column_names if c in READ])
    for block in dataset.iter(batch_size=1000):
        columns = list(block)
        for values in zip(*block.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def reads_parts(tokenizer: Any) -> bool:
    """Whether the chat template renders a list of text parts like the same text in a string."""

    def render(content: Any) -> Any:
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    if not getattr(tokenizer, "chat_template", None):
        return False
    try:
        return bool(render("probe") == render([{"type": "text", "text": "probe"}]))
    except Exception:  # whatever the template raises, it does not support parts
        return False


def checked_stream(stream: IterableDataset, name: str, tokenizer: Any) -> IterableDataset:
    """Adds the position of each row to a stream as a column, and checks each row that is read.

    Raises:
        BDPOError: raised when a row is read that is not a preference pair.
    """
    check = RowCheck(partial(reads_parts, tokenizer))

    def look(row: dict[str, Any], position: int) -> dict[str, Any]:
        raise_row(position, name, check(row) or _render_problems(row, tokenizer))
        return {ROW: position}

    return stream.map(look, with_indices=True)


def _render_problems(row: Mapping[str, Any], tokenizer: Any) -> list[Problem]:
    """Returns the error that the chat template or the tokenizer raises at a row, if any."""
    if [] in (row["chosen"], row["rejected"]):
        return []  # such rows are removed before TRL reads them
    try:
        whole = row if "prompt" in row else {**row, **extract_prompt(row)}
        tokenizer(list(rendered(whole, tokenizer)))
    except Exception as error:  # a template can raise anything
        told = " ".join(str(error).split())[:200]
        words = f"the chat template or tokenizer raises {type(error).__name__}: {told}"
        return [(words, _UNREADABLE)]
    return []


def without_misleading_columns(dataset: Any) -> Any:
    """Removes the columns that may make TRL mistake text for conversations, or the reverse."""
    columns = dataset.column_names or next(iter(dataset))
    return dataset.remove_columns([column for column in _MISLEADING if column in columns])


def without_rows(dataset: Dataset, empty: Sequence[int], name: str) -> tuple[Dataset, list[str]]:
    """Removes the rows in which a response has no message. Also returns the messages about them.

    TRL distinguishes conversations from text by a first message, and picks the response that it
    looks at by chance.

    Raises:
        BDPOError: no rows are left.
    """
    if not empty:
        return dataset, []
    report = DataReport(name, len(dataset), {"empty": list(empty)}, _file_rows(dataset))
    report.raise_if_nothing_left()
    dropped = set(empty)
    kept = [row for row in range(len(dataset)) if row not in dropped]
    return dataset.select(kept), report.lines()


@contextmanager
def unreadable_rows_named(dataset: Dataset, name: str, tokenizer: Any) -> Iterator[None]:
    """Context manager that turns an error of TRL into one that lists all unreadable rows.

    These are the rows at which the chat template or the tokenizer raises.

    Raises:
        BDPOError: raised in place of TRL's error, if there are such rows.
    """
    try:
        yield
    except Exception:
        numbers = _file_rows(dataset) or (dataset[ROW] if ROW in dataset.column_names else None)
        report = RowReport(name, total=len(dataset), numbers=numbers)
        for number, row in enumerate(dataset):
            report.add(number, _render_problems(row, tokenizer))
        raise_problems([report])
        raise
