"""The topics of the tiny model's grammar: tasks, and the phrases that answers are built from.

The unsafe half are harmless stand-ins: mischief that is plainly wrong and that nobody can learn
here.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Topic(NamedTuple):
    """One task that a user may ask about. The texts fit after "you need", "first" and so on."""

    task: str
    needs: str
    steps: tuple[str, str, str]
    reason: str = ""
    instead: str = ""

    @property
    def safe(self) -> bool:
        return not self.reason


def _read(kind: str) -> tuple[Topic, ...]:
    topics = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))[kind]
    return tuple(Topic(**{**topic, "steps": tuple(topic["steps"])}) for topic in topics)


SAFE, UNSAFE = _read("safe"), _read("unsafe")

#: The number of topics at the end of each half that the training pairs never use.
HELD_OUT = 4
