"""Makes untrusted text safe to print to a terminal. Standard library only."""

from __future__ import annotations


def visible(text: str) -> str:
    """Returns the text with all control and invisible characters written as escape sequences.

    Line breaks stay: ``"a\\x1b[2Jb"`` becomes ``"a\\\\x1b[2Jb"``.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
