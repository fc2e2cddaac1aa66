"""Finds the token ids that a chat template writes around the messages of a conversation. The search
for a null prompt (:mod:`~bdpo_plugin.reference.null_prompt`) calls it.

It renders conversations of its own and compares the results, so that it needs no knowledge of
headers or special tokens. Token ids are represented as strings with one character per id, so that
Python's string search can find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any, TypeVar

import numpy as np

#: Messages with different first and last tokens, which also merge with a space differently.
_PROBES = ("Who was it?", "7 blue apples", "the end;", "I see: yes", "Explain this!", "A line.")
#: Typical system messages, with line breaks and lists, so that the end of a turn is not confused
#: with text inside a turn.
_SYSTEM = ("Note: be brief.\n\n- user: yes", "You are a poet.\n\n1. rhyme: no")
_USER = ("user", "Tell me more.")
_ASSISTANT, _OTHER_ANSWER = ("assistant", "All right."), ("assistant", "No: that is all!")

Message = tuple[str, str]
T = TypeVar("T")
#: (n,) token ids.
Ids = Sequence[int] | np.ndarray


def as_string(ids: Ids) -> str:
    """Converts token ids to a string, each id to the character with that code point."""
    return np.asarray(ids, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


def as_ids(string: str) -> tuple[int, ...]:
    """Converts a string back to token ids; the inverse of :func:`as_string`."""
    return tuple(map(ord, string))


def common_start(strings: Iterable[str]) -> str:
    """Returns the longest common prefix of the strings."""
    return commonprefix(list(strings))  # noqa: RUF071, compares characters, as wanted here


def common_end(strings: Iterable[str]) -> str:
    """Returns the longest common suffix of the strings."""
    return common_start(string[::-1] for string in strings)[::-1]


@dataclass(frozen=True)
class Turns:
    """The tokens that a chat template writes around messages; each field but the last is a string
    of token ids.

    Attributes:
        front: the tokens before a user message that is the whole conversation, including a default
            system block of the template. If the template requires a system message, those with an
            empty one.
        back: the tokens after this message, up to the beginning of the response.
        opener: the tokens right before any user message, wherever it stands; may be empty.
        closer: the tokens right after a user message that are the same in every conversation; what
            follows them, such as the beginning of a thought, may differ.
        system: the tokens before a system message; None if the template has no place for one, or
            writes it into the user's turn without tokens before it.
        after_system: the tokens between a system message and the user message.
        roles: the tokens that begin a message of each role other than user and assistant.
    """

    front: str
    back: str
    opener: str
    closer: str
    system: str | None
    after_system: str
    roles: dict[str, str]

    def before_query(self, prompt: str) -> str | None:
        """Returns the part of a prompt before the first user message; None if it is not found."""
        # if one of the two is a prefix of the other, the longer one is more specific
        for beginning in sorted({self.front, self.system or self.front}, key=len, reverse=True):
            if prompt.startswith(beginning):
                if beginning == self.front:
                    return self.front
                at = prompt.find(self.after_system, len(beginning))
                if at >= 0:
                    return prompt[: at + len(self.after_system)]
        at = prompt.find(self.opener) if self.opener else -1
        return None if at < 0 else prompt[: at + len(self.opener)]

    def after_query(self, prompt: str) -> str | None:
        """Returns the part of a prompt after the last user message; None if it is not found."""
        at = prompt.rfind(self.closer)
        return None if at < 0 else prompt[at:]


def template_turns(tokenizer: Any) -> Turns | None:
    """Returns the turns of a tokenizer's chat template.

    None if there is no template, or if it can render neither a single user message nor one after a
    system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    # the templates of some vision-language models accept only a list of parts as content
    as_parts = [lambda text: text, lambda text: [{"type": "text", "text": text}]]
    found = (_turns(partial(_render, tokenizer, content)) for content in as_parts)
    return next(filter(None, found), None)


def _render(
    tokenizer: Any, content: Callable[[str], Any], messages: Sequence[Message], generate: bool
) -> str | None:
    conversation = [{"role": role, "content": content(text)} for role, text in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=generate, tokenize=False
        )
    # A template is a program of the user, which may raise any exception for a conversation that it
    # does not support.
    except Exception:
        return None
    return as_string(tokenizer(text, add_special_tokens=False)["input_ids"])


def _all(values: Iterable[T | None]) -> list[T] | None:
    """Returns the values as a list; None if one of them is None."""
    found = list(values)
    there = [value for value in found if value is not None]
    return there if len(there) == len(found) else None


def _turns(render: Callable[[Sequence[Message], bool], str | None]) -> Turns | None:
    def around(
        *messages: Message | str, texts: Sequence[str] = _PROBES, generate: bool = True
    ) -> tuple[str, str] | None:
        """Returns what the template writes before and after the message of which `messages` gives
        only the role; None if it cannot be found."""
        rendered = _all(
            render([(m, text) if isinstance(m, str) else m for m in messages], generate)
            for text in texts
        )
        if rendered is None or len(set(rendered)) == 1:
            return None
        before = common_start(rendered)
        return before, common_end(string[len(before) :] for string in rendered)

    lone = around("user")
    after_systems = _all(around(("system", text), "user") for text in _SYSTEM)
    first = lone or (after_systems and after_systems[0])
    if not first:
        return None
    # the messages with which every conversation must begin
    start = [] if lone else [("system", _SYSTEM[0])]
    front, back = first

    system, after_system = None, ""
    aside = around("system", _USER, texts=_SYSTEM)
    if aside and after_systems and (lone is None or aside[0] != front):
        system, after_system = aside[0], common_end(before for before, _ in after_systems)
    if not after_system:
        system = None
    if lone is None:
        if system is None:
            return None
        front = system + after_system

    later = _all(around(*start, _USER, answer, "user") for answer in (_ASSISTANT, _OTHER_ANSWER))
    opener = common_end([front, *(ends[0] for ends in later)]) if later else front
    # an opener that also occurs in or before a system message is of no use
    before = after_systems[0][0] if system and after_systems else opener
    if before.find(opener) + len(opener) != len(before):
        opener = ""
    answered = around(*start, "user", _ASSISTANT, generate=False)
    closer = common_start([back, answered[1]]) if answered else back

    roles = {"system": system} if system else {}
    spoken = render([*start, _USER, _ASSISTANT], False)
    called = around(*start, _USER, _ASSISTANT, "tool")
    if spoken and called and called[0].startswith(spoken) and len(called[0]) > len(spoken):
        roles["tool"] = called[0][len(spoken) :]
    return Turns(front, back, opener, closer or back, system, after_system, roles)
