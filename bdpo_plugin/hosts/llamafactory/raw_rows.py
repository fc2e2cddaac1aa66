"""Checks dataset rows before LLaMA-Factory converts them, and reports rows that it will drop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from bdpo_plugin.data.files import json_problem
from bdpo_plugin.data.pairs import first_rows
from bdpo_plugin.data.raw_rows import (
    FILL,
    MessageForm,
    Problem,
    check_rows,
    kind_of,
    missing_columns,
    raise_row,
)
from bdpo_plugin.data.recorded_sources import record_source
from bdpo_plugin.hosts.wrapping import Arguments, Call
from bdpo_plugin.output.tables import print_problems
from bdpo_plugin.settings import BDPOError

_NAME = "Name it in `columns` of dataset_info.json."
_ROLES = "Name it in `tags` of dataset_info.json."


def load(call: Call, given: Arguments) -> Any:
    """Calls LLaMA-Factory's `_load_single_dataset` with these arguments, and explains its errors.

    Raises:
        BDPOError: raised in place of LLaMA-Factory's error, if a local file does not exist or if a
            JSON file is empty or invalid.
    """
    try:
        return call()
    except BDPOError:
        raise
    except Exception as error:  # the reader can raise anything
        attributes, data_args = given["dataset_attr"], given["data_args"]
        if attributes.load_from == "file":
            path = Path(data_args.dataset_dir, attributes.dataset_name)
            if not path.exists():
                raise BDPOError(
                    f"The file {path} of `dataset_dir: {data_args.dataset_dir}` is not there: "
                    "correct `file_name` in dataset_info.json, or `dataset_dir`."
                ) from error
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            for file in files:
                if file.suffix in (".json", ".jsonl") and (problem := json_problem(file)):
                    raise BDPOError(
                        f"The file {file} cannot be read: {problem}. Nothing has been computed."
                    ) from error
        raise


def align(call: Call, given: Arguments) -> Any:
    """Checks the rows of a dataset, then calls LLaMA-Factory's `align_dataset` on it.

    Raises:
        BDPOError: rows are not preference pairs. For a stream, it is raised when such a row is
            read.
    """
    dataset, attributes = given["dataset"], given["dataset_attr"]
    problems = partial(_problems, attributes)
    name = attributes.dataset_name
    if isinstance(dataset, IterableDataset):
        given["dataset"] = _checked_stream(dataset, name, problems)
        return call()
    check_rows(dataset, name, problems)
    aligned = call()
    print_problems(_dropped(aligned, name))
    record_source(dataset, aligned)
    return aligned


def _checked_stream(stream: IterableDataset, name: str, problems: Any) -> IterableDataset:
    def look(row: dict[str, Any], position: int) -> dict[str, Any]:
        raise_row(position, name, problems(row))
        return row

    return stream.map(look, with_indices=True)


def _dropped(aligned: Dataset, name: str) -> list[str]:
    """Returns the messages about rows that LLaMA-Factory's tokenisation will drop."""
    rows = [
        number
        for number, row in enumerate(aligned.select_columns(["_prompt", "_response"]))
        if len(row["_prompt"]) % 2 != 1 or len(row["_response"]) < 2
    ]
    if not rows:
        return []
    told = (
        f"{len(rows)} of {len(aligned)} rows of the {name} data: the turns do not alternate "
        "between user and assistant up to a last one of the user, so LLaMA-Factory drops them "
        f"(rows {first_rows(rows)})"
    )
    if len(rows) == len(aligned):
        raise BDPOError(f"{told}. Nothing is left to train on.")
    return [told]


def _problems(attributes: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields the problems of a row.

    Args:
        attributes: LLaMA-Factory's `DatasetAttr`, which names columns, keys and roles.
        row: the row, by column.
    """
    messages = attributes.formatting != "alpaca"
    form = _form(attributes)
    wanted = [attributes.chosen, attributes.rejected]
    if messages:
        wanted.append(attributes.messages)
    yield from missing_columns(row, wanted, _NAME)
    for column in wanted:
        if column not in row:
            continue
        if row[column] is None:
            yield f"`{column}` is None", FILL
        elif not messages:
            if not isinstance(row[column], str):
                yield f"`{column}` is {kind_of(row[column])}, not text", "Write text."
        elif column != attributes.messages:
            yield from form.problems(column, row[column])
        elif not isinstance(row[column], list):
            yield f"`{column}` is {kind_of(row[column])}", "Write a list of messages."
        else:
            for message in row[column]:
                yield from form.problems(column, message)
    if not messages:
        yield from _query(attributes, row)


def _query(attributes: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    columns = [c for c in (attributes.prompt, attributes.query) if c]
    for column in columns:
        if not isinstance(row.get(column), str | None):
            yield f"`{column}` is {kind_of(row[column])}, not text", "Write text."
    if not any(row.get(column) for column in columns):
        words = " and ".join(f"`{column}`" for column in columns)
        yield f"the prompt is empty: {words}", FILL


def _form(attributes: Any) -> MessageForm:
    roles = [attributes.user_tag, attributes.assistant_tag, attributes.observation_tag]
    roles += [attributes.function_tag, attributes.system_tag]
    return MessageForm(
        attributes.role_tag, attributes.content_tag, roles, _ROLES, _ROLES, calls=True
    )
