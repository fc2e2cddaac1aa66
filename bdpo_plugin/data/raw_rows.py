"""Checks that the rows of a dataset, as the user wrote them, are preference pairs. The hosts call
it before they tokenise the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bdpo_plugin.data.pairs import first_rows
from bdpo_plugin.settings import BDPOError

#: A message that says what is wrong, and one that says how to fix it.
Problem = tuple[str, str]

#: How to fix a missing value.
FILL = "Remove these rows, or fill them in."

_FORM = "Write text, or a list of messages {'role': ..., 'content': ...}."
_ONE_FORM = "Write all sides as text, or all of them as lists of messages."
_IN_THEM = " Where the responses have the prompt in them, remove the column `prompt`."
_PROMPT = "Write the prompt into a column `prompt`, or at the beginning of both responses."
_SURROGATE = (
    "Write the character whole, or take it out: "
    "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
)
_MESSAGES = "a list of messages"


@dataclass
class RowReport:
    """The problems found in the rows of a dataset.

    Attributes:
        name: the name of the dataset.
        unit: the noun for the rows in messages.
        total: the number of rows checked.
        rows: the positions of the rows with each :data:`Problem`.
        general: problems of the dataset as a whole.
        numbers: the names by which the user knows the rows; default: positions.
    """

    name: str
    unit: str = "rows"
    total: int = 0
    rows: dict[Problem, list[int]] = field(default_factory=dict)
    general: list[str] = field(default_factory=list)
    numbers: Sequence[int | str] | None = None

    def add(self, row: int, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.rows.setdefault(problem, []).append(row)

    def lines(self) -> list[str]:
        """Returns one line for each problem found, the most frequent first. After ten problems, one
        line summarises the rest."""
        kinds = sorted(self.rows.items(), key=lambda item: -len(item[1]))
        lines = [
            f"{len(rows)} of {self.total} {self.unit}: {words} "
            f"(rows {first_rows(rows, self.numbers)}). {remedy}"
            for (words, remedy), rows in kinds[:10]
        ]
        if others := kinds[10:]:
            rows = sorted({row for _, rows in others for row in rows})
            lines.append(
                f"{len(others)} more kinds of problem (rows {first_rows(rows, self.numbers)})."
            )
        return [*self.general, *lines]


def raise_problems(reports: Iterable[RowReport]) -> None:
    """Raises a :class:`BDPOError` that lists all problems of some reports, if there are any."""
    told: list[str] = []
    for report in reports:
        if lines := report.lines():
            told.append(f"The {report.name} data cannot be trained on:")
            told += [f"- {line}" for line in lines]
    if told:
        raise BDPOError("\n".join([*told, "Nothing has been computed."]))


def check_rows(
    rows: Iterable[Any],
    name: str,
    problems: Callable[[Any], Iterable[Problem]],
    numbers: Sequence[int | str] | None = None,
) -> None:
    """Raises a :class:`BDPOError` that lists all problems of the rows of a dataset, if there are
    any. It has a problem if it has no rows."""
    report = RowReport(name, numbers=numbers)
    for number, row in enumerate(rows):
        report.total += 1
        report.add(number, problems(row))
    if not report.total:
        report.general.append("It has no rows.")
    raise_problems([report])


def raise_row(position: int, name: str, problems: Iterable[Problem]) -> None:
    """Raises a :class:`BDPOError` that lists all problems of the row at a position of a stream, if
    there are any."""
    if told := "; ".join(f"{words}. {remedy}" for words, remedy in problems):
        raise BDPOError(
            f"Row {position} of the {name} data, a stream, cannot be trained on: {told} "
            "Filter such rows out of the stream."
        )


def missing_columns(
    row: Mapping[str, Any], columns: Iterable[str], remedy: str
) -> Iterator[Problem]:
    """Yields a problem for each of some columns that a row does not have."""
    for column in columns:
        if column not in row:
            yield f"there is no `{column}`, only {', '.join(map(repr, row)) or 'nothing'}", remedy


def missing_keys(where: str, message: Any, keys: Collection[str], remedy: str) -> Iterator[Problem]:
    """Yields a problem for each of some keys that a message does not have. `where` describes the
    message, and `remedy` how to mend it."""
    if not isinstance(message, Mapping):
        wanted = " and ".join(f"`{key}`" for key in keys)
        words = f"{where} is {kind_of(message)}, not a dict with {wanted}"
        yield words, "Write a dict with these keys."
        return
    for key in keys:
        if key not in message:
            found = ", ".join(map(repr, message)) or "none"
            yield f"{where} has no `{key}` (its keys: {found})", remedy


@dataclass(frozen=True)
class MessageForm:
    """The required form of a message, for a host whose users configure its keys and roles.

    Attributes:
        role, content: the keys of a message.
        roles: the values of `role` that the host knows; empty if they are not known.
        name_keys, name_roles: messages that say where to configure other keys and roles.
        calls: whether a message with `tool_calls` needs no text.
    """

    role: str
    content: str
    roles: Collection[str]
    name_keys: str
    name_roles: str
    calls: bool

    def problems(self, column: str, message: Any) -> Iterator[Problem]:
        """Yields the problems of a message of a column."""
        where, keys = f"a message of `{column}`", (self.role, self.content)
        yield from missing_keys(where, message, keys, self.name_keys)
        if not isinstance(message, Mapping):
            return
        for key in keys:
            free = key == self.content and self.calls and message.get("tool_calls")
            if key in message and not isinstance(message[key], str) and not free:
                yield f"the `{key}` of {where} is {kind_of(message[key])}", FILL
        role = message.get(self.role)
        if isinstance(role, str) and self.roles and role not in self.roles:
            yield f"the `{self.role}` of {where} is {role!r}", self.name_roles


class RowCheck:
    """Checks the rows of a dataset, one per call.

    A row has `chosen` and `rejected`, and usually `prompt`: all of them text, or all of them lists
    of messages with `role` and `content`. All rows must have the form of the first one.

    Args:
        reads_parts: returns whether the chat template accepts a content that is a list of text
            parts.
    """

    def __init__(self, reads_parts: Callable[[], bool] = lambda: False) -> None:
        self._reads_parts = reads_parts
        self._form: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> list[Problem]:
        """Returns the problems of a row. A pair that is well formed but cannot be trained on has
        none here."""
        remedy = "Name the columns `prompt`, `chosen` and `rejected`."
        found = list(missing_columns(row, ("chosen", "rejected"), remedy))
        forms = {}
        for column in ("prompt", "chosen", "rejected"):
            if column in row:
                forms[column] = "text" if isinstance(row[column], str) else _MESSAGES
                found += self._field(column, row[column])
        found += _template_arguments(row)
        return found or self._together(row, forms)

    def _field(self, column: str, value: Any) -> Iterator[Problem]:
        if isinstance(value, str):
            yield from _text(f"`{column}`", value)
        elif value is None:
            yield f"`{column}` is None", FILL
        elif not isinstance(value, list):
            yield f"`{column}` is {kind_of(value)}, neither text nor a list of messages", _FORM
        elif not value and column == "prompt":
            yield "`prompt` is an empty list", FILL
        else:
            for message in value:
                yield from self._message(column, message)

    def _message(self, column: str, message: Any) -> Iterator[Problem]:
        where = f"a message of `{column}`"
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        wanted = ("role",) if calls else ("role", "content")
        yield from missing_keys(where, message, wanted, "Name the keys `role` and `content`.")
        if not isinstance(message, Mapping):
            return
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str):
            yield from _text(f"the `role` of {where}", role)
        elif "role" in message:
            yield f"the `role` of {where} is {kind_of(role)}", "Write 'user' or 'assistant', say."
        if isinstance(content, str):
            yield from _text(f"the `content` of {where}", content)
        elif content is None:
            if "content" in wanted and "content" in message:
                yield f"the `content` of {where} is None", FILL
        elif not _are_text_parts(content):
            yield f"the `content` of {where} is {kind_of(content)}, not text", "Write text."
        elif not self._reads_parts():
            words = "a list of parts, which the chat template does not read"
            yield f"the `content` of {where} is {words}", "Join the parts into one text."
        else:
            for part in content:
                yield from _text(f"the `content` of {where}", part["text"])

    def _together(self, row: Mapping[str, Any], forms: Mapping[str, str]) -> list[Problem]:
        """Returns the problems of a row whose fields are valid one by one but not together."""
        if len(set(forms.values())) > 1:
            words = ", ".join(f"`{column}` is {form}" for column, form in forms.items())
            messages = forms["chosen"] == forms["rejected"] == _MESSAGES
            return [(words, _ONE_FORM + (_IN_THEM if messages else ""))]
        self._form = self._form or forms["chosen"]
        if forms["chosen"] != self._form:
            words = f"the row is {forms['chosen']}, and the first one is {self._form}"
            return [(words, _ONE_FORM)]
        if "prompt" not in row and not _share_a_prompt(row["chosen"], row["rejected"]):
            words = "there is no `prompt`, and `chosen` and `rejected` do not begin with the same"
            return [(words, _PROMPT)]
        return []


def kind_of(value: Any) -> str:
    """Describes the type of a value for a message."""
    if value is None:
        return "None"
    names = {"dict": "a dict", "list": "a list", "int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")


def _text(where: str, text: str) -> Iterator[Problem]:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        yield f"{where} has half of a surrogate pair, which is no character", _SURROGATE


def _are_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    )


def _share_a_prompt(chosen: Any, rejected: Any) -> bool:
    """Whether both responses begin with a common prompt, which TRL extracts from them."""
    if isinstance(chosen, list) and not (chosen and rejected):
        return True  # a later check drops pairs with an empty response
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)) - 1,
    )
    if isinstance(chosen, str) and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1
    return shared > 0


def _template_arguments(row: Mapping[str, Any]) -> Iterator[Problem]:
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], Mapping):
        kind = kind_of(row["chat_template_kwargs"])
        yield f"`chat_template_kwargs` is {kind}", "Write a dict, or remove the column."
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            json.loads(tools)
        except ValueError:
            yield "`tools` is text, but not JSON", "Write JSON, or a list of tools."
    elif not isinstance(tools, list | None):
        yield f"`tools` is {kind_of(tools)}", "Write JSON, or a list of tools."
