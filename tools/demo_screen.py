"""What `make demo` shows of a host's output: B-DPO's tables, its bars, and that of the training.

A filter from standard input to standard output. On a terminal a bar moves; anywhere else, such as
in the log of a CI, it is one line, written when it is full. All else that the host writes is in
the file that `make demo` names.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator

_BAR = re.compile(r"((?P<name>.*): )?\s*(?P<percent>\d+)%\|.*?\| *\S+?/(?P<total>\S+) \[.*?\]")
_OURS = ("Scoring the ", "Checking the prompts of the ")
_TABLE = ("B-DPO", "┌", "│", "├", "└")
_CLEAR = "\r\x1b[K"


def pieces(characters: Iterable[str]) -> Iterator[str]:
    """Each line, and each state of a bar, as soon as it is whole; without what moves a cursor."""
    piece = ""
    for character in characters:
        if character not in "\r\n":
            piece += character
            continue
        yield re.sub(r"\x1b\[\w", "", piece).rstrip()
        piece = ""
    yield piece


def screen(shown: Iterable[str], terminal: bool) -> Iterator[str]:
    """What to write, for the pieces of a host's output."""
    training = None  # the total of its bar: the first one without a name; evaluations have others
    full: set[str] = set()
    moving = False  # the terminal's last line is a bar that is not full
    for piece in shown:
        if piece.startswith(_TABLE):
            yield (_CLEAR if moving else "") + piece + "\n"
            moving = False
        elif bar := _BAR.match(piece):
            name, piece = bar["name"], bar[0]  # a warning may follow it on the same line
            if name is None:
                training = training or bar["total"]
                if bar["total"] != training:
                    continue
                name, piece = "Training", f"Training: {piece}"
            elif not name.startswith(_OURS):
                continue
            if name in full:
                continue
            moving = bar["percent"] != "100"
            if not moving:
                full.add(name)
            if terminal:
                yield _CLEAR + piece + ("" if moving else "\n")
            elif not moving:
                yield piece + "\n"
    if moving and terminal:
        yield "\n"


def main() -> None:
    """Filter the standard input, to its end also where the host is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.reconfigure(errors="replace", newline="")
    characters = iter(lambda: sys.stdin.read(1), "")
    for text in screen(pieces(characters), sys.stdout.isatty()):
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
