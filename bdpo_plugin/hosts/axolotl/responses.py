"""Corrects responses that Axolotl cuts out of the chat template's text at a wrong place.

Axolotl's `chat_template.*` functions render a response after a dummy message of their own, and keep
the text from the first occurrence of the response's content on. For contents such as "y", "user" or
an empty text, that occurrence is in the template itself or in the dummy message. If the template
does not write the content verbatim, for example because it strips white space, Axolotl keeps the
last character only. This module finds the place with a sentinel text that occurs nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from operator import eq
from typing import Any, NamedTuple
from uuid import uuid4

from axolotl.utils.chat_templates import get_chat_template

from bdpo_plugin.data.raw_rows import Problem

Message = dict[str, str]

_LOST = "Axolotl does not find the text of `{}` in what the chat template makes of it"
_TEXT = (
    "Remove them from the data; or write prompt and responses as text, which `type: passthrough` "
    "takes as it is."
)


class _Frame(NamedTuple):
    """The text that the chat template writes before and after a response."""

    before: str
    after: str


class Corrections(NamedTuple):
    """The corrections of a row.

    Attributes:
        columns: the new texts of the formatted columns that were wrong.
        problems: the reasons why the row cannot be trained on.
        notes: what the user should know about the row.
    """

    columns: dict[str, str]
    problems: list[Problem]
    notes: list[Problem]


def _overlap(before: str, text: str) -> bool:
    """Whether the end of `before` is a beginning of `text`.

    Axolotl may then have found the response too early, if the template writes less of it."""
    length = text.find(before[-1:]) + 1
    while before and length:
        if before.endswith(text[:length]):
            return True
        length = text.find(before[-1], length) + 1
    return False


class Conversations:
    """Reads the messages of a row as Axolotl's functions for chat templates do.

    Args:
        known: the closure variables of such a function.

    Attributes:
        role, content: the keys of a message.
        sides: ``chosen`` and ``rejected`` -> the columns of the responses.
        field_messages: the column of the prompt; None if the response columns begin with the
            prompt.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        mapping = known["message_property_mappings"]
        self.role, self.content = mapping["role"], mapping["content"]
        self.sides = {"chosen": known["field_chosen"], "rejected": known["field_rejected"]}
        self.field_messages: str | None = known.get("field_messages")
        self._roles = known["role_map"]

    def prompt(self, raw: Mapping[str, Any]) -> list[Message]:
        """Returns the messages of a row's prompt."""
        field = self.field_messages
        messages = raw[self.sides["chosen"]][:-1] if field is None else raw[field]
        if isinstance(messages, str):
            return [{"role": "user", "content": messages}]
        return [self.message(message) for message in messages]

    def response(self, value: Any) -> Message:
        """Returns the message of a response column that is trained on."""
        if isinstance(value, str):
            return {"role": "assistant", "content": value}
        return self.message(value if isinstance(value, Mapping) else value[-1])

    def before(self, value: Any) -> list[Message]:
        """Returns the messages of a response column before the one that is trained on."""
        if not isinstance(value, list):
            return []
        return [self.message(message) for message in value[:-1]]

    def message(self, message: Mapping[str, Any]) -> Message:
        """Returns a message in the form that the chat template expects."""
        role = self._roles[message[self.role]]
        return {"role": role, "content": message[self.content]}


class Responses:
    """Finds the responses in a dataset that is formatted with a chat template.

    Args:
        known: the closure variables of Axolotl's function that formats the rows.
        tokenizer: the tokenizer of the run.

    Attributes:
        notes: what the user should know about the dataset.
    """

    def __init__(self, known: Mapping[str, Any], tokenizer: Any) -> None:
        self._read = Conversations(known)
        self._tokenizer = tokenizer
        self._template = get_chat_template(
            known["chat_template_choice"], known["chat_template_jinja"], tokenizer
        )
        self._sentinel = uuid4().hex
        self._frames: dict[tuple[str, ...], _Frame | None] = {}
        self.notes: set[str] = set()

    def corrections(self, raw: Mapping[str, Any], made: Mapping[str, Any]) -> Corrections:
        """Returns the corrections of a row.

        Args:
            raw: the row before formatting.
            made: the row as Axolotl formatted it.
        """
        found = Corrections({}, [], [])
        messages = self._read.prompt(raw)
        found.problems.extend(self._left_out(raw, messages))
        for side, field in self._read.sides.items():
            response = self._read.response(raw[field])
            key = tuple(message["role"] for message in (*messages, response))
            if key not in self._frames:
                frame = self._frames[key] = self._frame(messages, response)
                if frame is not None:
                    self._look_between(made["prompt"], frame.before)
            frame = self._frames[key]
            text = response["content"]
            if (
                frame is None
                or made[side] != text + frame.after.rstrip()
                or _overlap(frame.before, text)
            ):
                self._correct(found, side, field, messages, response, made)
            elif not made[side]:
                found.problems.append((f"`{field}` is empty", "Remove these rows."))
        return found

    def _correct(
        self,
        found: Corrections,
        side: str,
        field: str,
        messages: Sequence[Message],
        response: Message,
        made: Mapping[str, Any],
    ) -> None:
        """Adds the template's text of a response to `found` where Axolotl's differs."""
        frame = self._frame(messages, response)
        whole = self._render([*messages, response])
        if frame is not None and whole.startswith(frame.before):
            text = whole[len(frame.before) :]
        elif whole.startswith(made["prompt"]):
            text = whole[len(made["prompt"]) :]
        else:
            words = _LOST.format(field)
            found.problems.append((words, "Change these rows, or choose another template."))
            return
        end = ""
        if frame is not None and text.endswith(frame.after):
            text, end = text[: len(text) - len(frame.after)], frame.after.rstrip()
        else:
            text = text.rstrip()
        if not text + end:
            found.problems.append((f"`{field}` is empty", "Remove these rows."))
        elif text + end != made[side]:
            found.columns[side] = text + end
            found.notes.append(
                (
                    f"Axolotl cuts `{field}` out of the chat template's text at a wrong place",
                    "B-DPO trains on what the template writes for it.",
                )
            )
        if "".join(text.split()) != "".join(response["content"].split()):
            found.notes.append(
                (
                    f"the chat template writes another text than that of `{field}`",
                    "It may leave out a part, such as reasoning: `bdpo doctor` shows what is read.",
                )
            )

    def _frame(self, messages: Sequence[Message], response: Message) -> _Frame | None:
        """Returns the text around the response; None if the template does not write it verbatim."""
        told = {"role": response["role"], "content": self._sentinel}
        before, found, after = self._render([*messages, told]).partition(self._sentinel)
        return _Frame(before, after) if found else None

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tools=tools, tokenize=False
        )
        return text

    def _left_out(self, raw: Mapping[str, Any], messages: Sequence[Message]) -> Iterator[Problem]:
        """Yields the parts of a row that the template would write but that Axolotl drops."""
        fields = {*self._read.sides.values()}
        if self._read.field_messages is not None:
            fields.add(self._read.field_messages)
        for field in sorted(fields):
            if isinstance(raw[field], str):
                continue
            theirs = [raw[field]] if isinstance(raw[field], Mapping) else raw[field]
            keys = {
                key
                for message in theirs
                for key, inner in message.items()
                if inner
                and key not in (self._read.role, self._read.content)
                and key in self._template
            }
            if not keys:
                continue
            plain = [self._read.message(message) for message in theirs]
            whole = [
                {key: message[key] for key in keys if message.get(key)} | ours
                for message, ours in zip(theirs, plain, strict=True)
            ]
            if self._differ(plain, whole):
                names = ", ".join(f"`{key}`" for key in sorted(keys))
                yield f"Axolotl does not hand {names} of `{field}` to the chat template", _TEXT
        tools = raw.get("tools") if "tools" in self._template else None
        if tools and self._differ(messages, messages, tools):
            yield "Axolotl does not hand `tools` to the chat template", _TEXT

    def _look_between(self, prompt: str, before: str) -> None:
        """Notes text between prompt and response that only one of the two renderings contains."""
        common = sum(takewhile(bool, map(eq, prompt, before)))
        if before[common:].strip():
            self.notes.add(
                f"the chat template writes {before[common:]!r} before a response. Axolotl leaves "
                "it out, and so does B-DPO."
            )
        if prompt[common:].strip():
            self.notes.add(
                f"the chat template ends a prompt with {prompt[common:]!r}, and writes responses "
                "without. Axolotl trains on them behind it, and so does B-DPO."
            )

    def _differ(self, plain: Any, whole: Any, tools: Any = None) -> bool:
        try:
            return self._render(plain) != self._render(whole, tools)
        except Exception:  # a template can raise anything at input that it is not meant for
            return False
