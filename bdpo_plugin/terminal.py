"""Text that others wrote, as it may go to a terminal. Standard library only."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with every character that a terminal would obey, or not show, spelt out.

    Line breaks stay: ``"a\\x1b[2Jb"`` becomes ``"a\\\\x1b[2Jb"``.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
