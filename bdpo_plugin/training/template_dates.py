"""Finds and removes today's date where a chat template writes it into every prompt. The check of
checkpoints uses it.

Llama 3.2, gpt-oss, SmolLM3 and Granite have such templates. If a run is resumed on another day, its
prompts differ in the date and in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

#: The text that replaces a date.
PLACEHOLDER = "<date>"

_WORD = r"[^\W\d_]+\.?"
#: Regular expressions for the directives of `strftime` that give more than one or two digits.
_DIRECTIVES = {
    **dict.fromkeys("aAbBhpPZ", _WORD),
    **dict.fromkeys("ekl", r" ?\d{1,2}"),
    "Y": r"\d{4}",
    "G": r"\d{4}",
    "j": r"\d{1,3}",
    "f": r"\d{6}",
    "z": r"[+-]?\d*:?\d*",
    "D": r"\d\d/\d\d/\d\d",
    "F": r"\d{4}-\d\d-\d\d",
    "T": r"\d\d:\d\d:\d\d",
    "R": r"\d\d:\d\d",
    "c": rf"{_WORD} {_WORD} +\d{{1,2}} \d\d:\d\d:\d\d \d{{4}}",
    "x": r"\d\d/\d\d/\d\d",
    "X": r"\d\d:\d\d:\d\d",
    "s": r"\d+",
    "%": "%",
    "n": r"\n",
    "t": r"\t",
}
#: The function by which a chat template reads the clock.
CLOCK = "strftime_now"
_CALL = re.compile(rf"{CLOCK}\s*\(")
_LITERAL = re.compile(r"""\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
#: Matches any string literal that contains a directive.
_ANY_FORMAT = re.compile(r"""(["'])([^"'\n{}]*%[-#]?[A-Za-z][^"'\n{}]*)\1""")


@dataclass(frozen=True)
class TemplateDates:
    """The dates that the chat template of a run writes into its prompts.

    Attributes:
        template: the source of the template; fixed dates in it are not removed from prompts.
        formats: the `strftime` formats, each with the number of times that a prompt may contain it.
    """

    template: str
    formats: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tokenizer: Any, host: Iterable[str] = ()) -> TemplateDates | None:
        """Finds the dates of a tokenizer's chat template; returns None if neither the template nor
        the host writes any.

        Args:
            host: the formats of dates that the host itself writes into prompts.
        """
        given = getattr(tokenizer, "chat_template", None) or ""
        template = "\n".join(given.values()) if isinstance(given, dict) else str(given)
        calls = [_LITERAL.match(template, call.end()) for call in _CALL.finditer(template)]
        formats = [call.group(2) for call in calls if call]
        if None in calls:  # the format of a call is a variable, so every literal may be a format
            formats += [found.group(2) for found in _ANY_FORMAT.finditer(template)]
        formats += host
        if not formats:
            return None
        return cls(template, tuple((form, formats.count(form)) for form in dict.fromkeys(formats)))

    def without(self, text: str) -> str:
        """Returns a prompt with the template's dates replaced by :data:`PLACEHOLDER`."""
        for form, count in self.formats:
            places = [m for m in _pattern(form).finditer(text) if m.group() not in self.template]
            for found in reversed(places[:count]):
                text = text[: found.start()] + PLACEHOLDER + text[found.end() :]
        return text

    def first(self, text: str) -> str | None:
        """Returns the first date in a prompt that the template has written; None if there is
        none."""
        for form, _ in self.formats:
            for found in _pattern(form).finditer(text):
                if found.group() not in self.template:
                    return found.group()
        return None


def _pattern(form: str) -> re.Pattern[str]:
    parts = re.split(r"(%[-#_0^]?[A-Za-z%])", form)
    return re.compile(
        "".join(
            _DIRECTIVES.get(part[-1], r"\d{1,2}") if place % 2 else re.escape(part)
            for place, part in enumerate(parts)
        )
    )
