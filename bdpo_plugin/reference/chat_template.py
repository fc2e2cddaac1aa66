"""What a chat template writes around the messages of a conversation, as token ids.

Found by rendering conversations of our own: no header and no special token is known here.
Token ids are held as strings, one character each, so that Python's own search finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any, TypeVar

import numpy as np

#: Messages that share neither their first nor their last token, nor how these merge with a space.
_PROBES = ("Who was it?", "7 blue apples", "the end;", "I see: yes", "Explain this!", "A line.")
#: What system messages look like: what ends a turn must not be mistaken for what is in one.
_SYSTEM = ("Note: be brief.\n\n- user: yes", "You are a poet.\n\n1. rhyme: no")
_USER = ("user", "Tell me more.")
_ASSISTANT, _OTHER_ANSWER = ("assistant", "All right."), ("assistant", "No: that is all!")

Message = tuple[str, str]
T = TypeVar("T")
#: (n,) token ids.
Ids = Sequence[int] | np.ndarray


def as_string(ids: Ids) -> str:
    """Token ids as a string, each the character of that number."""
    return np.asarray(ids, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


def as_ids(string: str) -> tuple[int, ...]:
    """The inverse of :func:`as_string`."""
    return tuple(map(ord, string))


def common_start(strings: Iterable[str]) -> str:
    """The longest beginning that all strings have."""
    return commonprefix(list(strings))  # noqa: RUF071, it is characters that are compared


def common_end(strings: Iterable[str]) -> str:
    """The longest end that all strings have."""
    return common_start(string[::-1] for string in strings)[::-1]


@dataclass(frozen=True)
class Turns:
    """A chat template's turns; each field but the last a string of token ids.

    Attributes:
        front: before the user's message where that is all there is, a system block of the
            template's own included; where the template wants a system message, with an empty one.
        back: after it, up to where the response begins.
        opener: right before any user's message, wherever it is; may be empty.
        closer: right after it, up to where the templates of a thought or the like may differ.
        system: before a system message; None where the template has no place for one, or writes
            it into the user's turn with nothing of its own before it.
        after_system: between a system message and the user's.
        roles: what begins a message of a role other than the user and the assistant.
    """

    front: str
    back: str
    opener: str
    closer: str
    system: str | None
    after_system: str
    roles: dict[str, str]

    def before_query(self, prompt: str) -> str | None:
        """The part of a prompt before the user's first message; None where it is not seen."""
        # where one of the two begins with the other, the longer one says more
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
        """The part of a prompt after the user's last message; None where it is not seen."""
        at = prompt.rfind(self.closer)
        return None if at < 0 else prompt[at:]


def template_turns(tokenizer: Any) -> Turns | None:
    """The turns of a tokenizer's chat template; None where there is none, or where it renders
    neither a lone message of the user nor one after a system message."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    # the templates of some models for images and text take a message as a list of parts alone
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
    # A template is a program of the user's, which may raise anything at a conversation that it
    # was not made for.
    except Exception:
        return None
    return as_string(tokenizer(text, add_special_tokens=False)["input_ids"])


def _all(values: Iterable[T | None]) -> list[T] | None:
    """The values; None where one of them is."""
    found = list(values)
    there = [value for value in found if value is not None]
    return there if len(there) == len(found) else None


def _turns(render: Callable[[Sequence[Message], bool], str | None]) -> Turns | None:
    def around(
        *messages: Message | str, texts: Sequence[str] = _PROBES, generate: bool = True
    ) -> tuple[str, str] | None:
        """What is rendered before and after the message that is given by its role alone."""
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
    # the beginning of every conversation that the template can render
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
    # it must not be seen in a system message
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
