"""Checks dataset rows before Axolotl formats them as text, and corrects the formatted responses.

The functions that a dataset's `type` names have no checks of their own: they write a missing value
as the text "None" and a list as its Python representation, take messages by position, and raise
other errors without the number of the row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from axolotl.loaders import load_tokenizer
from datasets import Dataset, DatasetDict

from bdpo_plugin.data.raw_rows import (
    FILL,
    MessageForm,
    Problem,
    RowReport,
    check_rows,
    kind_of,
    missing_columns,
    raise_problems,
)
from bdpo_plugin.data.recorded_sources import record_source
from bdpo_plugin.hosts.axolotl.responses import Conversations, Responses
from bdpo_plugin.hosts.axolotl.rewrite_config import LOG, MARK
from bdpo_plugin.hosts.wrapping import Arguments, Call
from bdpo_plugin.output.tables import print_problems
from bdpo_plugin.training.score_columns import FILE_ROW

#: Columns that functions unknown to us may read, if a dataset has them.
_READ = (
    "prompt",
    "input",
    "question",
    "chosen",
    "chosen_response",
    "rejected",
    "rejected_response",
)
#: Function of `chatml` or `llama3` -> groups of columns. It writes the first column of each group
#: that a row has as text.
_TEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "default": (
        ("prompt", "input", "question", "instruction"),
        ("chosen", "chosen_response"),
        ("rejected", "rejected_response"),
    ),
    "icr": (("input",), ("chosen",), ("rejected",)),
    "intel": (("question",), ("chosen",), ("rejected",)),
    "prompt_pairs": (("prompt",), ("chosen",), ("rejected",)),
    "ultra": (("prompt",),),
}
#: Function -> columns with two messages, which it reads by position: a question and its answer.
_TURNS = {"argilla_chat": ("chosen", "rejected"), "ultra": ("chosen", "rejected")}

#: The columns that every function returns.
_MADE = ("prompt", "chosen", "rejected")

_RENAME = (
    "Name the columns so; or write `type` as a mapping of `field_prompt`, `field_chosen` and "
    "`field_rejected`, with `prompt_format`, `chosen_format` and `rejected_format`."
)
_CHAT = "Write text, or use `type: chat_template.default`, which reads messages."
_RAISES = (
    "If these are all rows, change the dataset's `type` or the chat template; else change or "
    "remove them."
)
_LAST = "End it with an answer of the role `assistant`."
_ARGILLA = "Use `type: chat_template.argilla_chat`, which reads conversations of any length."


def map_dataset(call: Call, given: Arguments) -> Any:
    """Wraps Axolotl's `_map_dataset`: checks a B-DPO run's rows before and after formatting."""
    cfg, dataset, transform = (given[k] for k in ("cfg", "dataset", "ds_transform_fn"))
    if not cfg.get(MARK):
        return call()
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"]
    numbers: Sequence[str] | None = None
    rows = dataset
    if FILE_ROW in dataset.column_names:
        numbers, rows = dataset[FILE_ROW], dataset.remove_columns(FILE_ROW)
    name = next(iter(dataset.info.download_checksums or {}), "raw")
    strategy = _Strategy(transform)
    check_rows(rows, name, strategy.problems, numbers)
    tokenizer = given.get("tokenizer") or load_tokenizer(cfg)
    try:
        mapped = call()
    except Exception:
        more = {"tokenizer": tokenizer} if strategy.wants_tokenizer else {}

        def raised(row: dict[str, Any]) -> Iterator[Problem]:
            try:
                transform(dict(row), **more)
            except Exception as error:  # a strategy or a template can raise anything
                told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                yield f"the dataset's `type` raises {told}", _RAISES

        check_rows(rows, name, raised, numbers)
        raise
    if strategy.known is not None:
        mapped = _corrected(rows, mapped, Responses(strategy.known, tokenizer), name, numbers)
    elif not cfg.skip_prepare_dataset:  # the next step of Axolotl needs text
        made = mapped.select_columns([c for c in _MADE if c in mapped.column_names])
        check_rows(made, name, _made, numbers)
    record_source(rows, mapped)
    return mapped


def _corrected(
    rows: Dataset,
    mapped: Dataset,
    responses: Responses,
    name: str,
    numbers: Sequence[str] | None,
) -> Dataset:
    """Replaces responses that Axolotl formatted otherwise than the chat template writes them."""
    problems, notes = (RowReport(name, numbers=numbers, total=len(rows)) for _ in range(2))
    columns: dict[int, dict[str, str]] = {}
    for number, (raw, made) in enumerate(zip(rows, mapped, strict=True)):
        found = responses.corrections(raw, made)
        problems.add(number, found.problems)
        notes.add(number, found.notes)
        if found.columns:
            columns[number] = found.columns
    raise_problems([problems])
    notes.general.extend(sorted(responses.notes))
    print_problems([f"{name}: {line}" for line in notes.lines()])
    if not columns:
        return mapped
    return mapped.map(lambda row, number: columns.get(number, {}), with_indices=True)


class _Strategy:
    """The fields of a row that a prompt strategy reads, as far as its function reveals them.

    Attributes:
        known: the closure variables of the function if it renders a chat template, else None.
        wants_tokenizer: whether the function has a parameter for the tokenizer.
        problems: a function that yields the problems of a row.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        variables: Mapping[str, Any] = {}
        if inspect.isfunction(transform):
            variables = inspect.getclosurevars(transform).nonlocals
        self.wants_tokenizer = "tokenizer" in inspect.signature(transform).parameters
        self.known = variables if "message_property_mappings" in variables else None
        self._fields = [
            variables[f"field_{name}"]
            for name in ("messages", "prompt", "chosen", "rejected")
            if f"field_{name}" in variables
        ]
        module = str(getattr(transform, "__module__", "")).rpartition("axolotl.prompt_strategies.")
        of_axolotl = module[2] if module[1] else ""
        self._function = str(getattr(transform, "__qualname__", "")).partition(".")[0]
        self.problems: Callable[[Mapping[str, Any]], Iterator[Problem]] = {
            "dpo.chatml": self._format,
            "dpo.llama3": self._format,
            "dpo.user_defined": self._user_defined,
        }.get(of_axolotl, self._any)
        if self.known is not None:
            self.problems = self._conversation
        if of_axolotl == "dpo.zephyr":
            LOG.warning(
                "B-DPO: `type: zephyr.nectar` takes the answer with the highest `rank` as chosen "
                "and the one before it as rejected. In Nectar the best answer has rank 1: make the "
                "pairs yourself if your ranks are so."
            )

    # Functions that render a chat template ------------------------------------------------------

    def _conversation(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        assert self.known is not None
        found = list(missing_columns(row, self._fields, "Name it in the dataset's `field_...`."))
        prompt = self.known.get("field_messages")
        for field in self._fields if not found else ():
            found += _value(field, row[field], self._form)
            role = "user" if field == prompt else "assistant"
            if isinstance(row[field], str) and role not in self.known["role_map"]:
                words = f"`{field}` is text, which Axolotl takes for a message of the role {role!r}"
                found.append((words, self._form.name_roles))
            whole = isinstance(row[field], list) and len(row[field]) >= 2
            if prompt is None and not found and not whole:
                words = f"`{field}` is no list of messages with a prompt and an answer"
                found.append((words, "Use `type: chat_template.default`, or remove these rows."))
        yield from found or self._together(row)

    @cached_property
    def _form(self) -> MessageForm:
        assert self.known is not None
        mapping, roles = self.known["message_property_mappings"], self.known["role_map"]
        named: dict[str, list[str]] = {}
        for source, target in roles.items():
            named.setdefault(target, []).append(source)
        so_far = ", ".join(f"{target}: [{', '.join(sources)}]" for target, sources in named.items())
        return MessageForm(
            mapping["role"],
            mapping["content"],
            roles,
            "Name it in the dataset's `message_property_mappings`, which says `{role: "
            f"{mapping['role']}, content: {mapping['content']}}}` so far.",
            f"Name it in the dataset's `roles`, which say `{{{so_far}}}` so far.",
            calls=False,
        )

    def _together(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        """Yields problems between messages each of which is valid by itself."""
        assert self.known is not None
        read = Conversations(self.known)
        prompt = read.prompt(row)
        befores = {field: read.before(row[field]) for field in read.sides.values()}
        if read.field_messages is None:
            if len({str(before) for before in befores.values()}) > 1:
                words = " and ".join(f"`{field}`" for field in befores)
                yield f"{words} are answers to different messages", "Remove these rows."
        else:
            for field, before in befores.items():
                if before and prompt[-len(before) :] != before:
                    words = f"`{field}` has messages before its last one that are not the end of "
                    yield words + f"`{read.field_messages}`", _ARGILLA
        for field in befores:
            if (role := read.response(row[field])["role"]) in ("system", "user"):
                yield f"the last message of `{field}` is of the role {role!r}", _LAST

    # Functions that write a format --------------------------------------------------------------

    def _format(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        for group in _TEXTS.get(self._function, ()):
            column = next((name for name in group if name in row), None)
            if column is None:
                yield from missing_columns(row, group[:1], _RENAME)
            else:
                yield from _text(column, row[column])
        if row.get("system"):
            yield from _text("system", row["system"])
        for column in _TURNS.get(self._function, ()):
            yield from missing_columns(row, [column], _RENAME)
            value = row.get(column)
            if column not in row:
                continue
            if not isinstance(value, list) or len(value) != 2:
                number = f"{len(value)} messages" if isinstance(value, list) else kind_of(value)
                words = f"`{column}` is {number}, not a question and its answer"
                yield words, _ARGILLA
                continue
            form = MessageForm("role", "content", (), _RENAME, "", calls=False)
            for message in value:
                yield from form.problems(column, message)

    def _user_defined(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        yield from missing_columns(row, self._fields, "Name it in the mapping `type`.")
        for column in self._fields:
            if column in row:
                yield from _text(column, row[column])

    def _any(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        form = MessageForm("role", "content", (), "Name them so.", "", calls=False)
        for column in _READ:
            if column in row:
                yield from _value(column, row[column], form)


def _value(column: str, value: Any, form: MessageForm) -> Iterator[Problem]:
    if value is None:
        yield f"`{column}` is None", FILL
    elif not isinstance(value, str | list | dict):
        yield f"`{column}` is {kind_of(value)}", "Write text, or a list of messages."
    elif not value and not isinstance(value, str):
        yield f"`{column}` is empty", FILL
    elif not isinstance(value, str):
        for message in [value] if isinstance(value, dict) else value:
            yield from form.problems(column, message)


def _made(row: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields the problems of a row that has been formatted for DPO."""
    yield from missing_columns(row, _MADE, _RENAME)
    for column in _MADE:
        if column in row:
            yield from _text(column, row[column])
            if row[column] == "":
                yield f"`{column}` is empty", FILL


def _text(column: str, value: Any) -> Iterator[Problem]:
    if value is None:
        yield f"`{column}` is None", FILL
    elif not isinstance(value, str):
        yield f"`{column}` is {kind_of(value)}, not text", _CHAT
