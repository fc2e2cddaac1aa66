"""Reads preference pairs in several formats and converts them to the format of the recipes."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import BDPOError

#: ``{"messages": [message], "chosen": message, "rejected": message}``. A message is
#: ``{"role": ..., "content": ...}``.
Pair = dict[str, Any]

FORMS = (
    "the columns `messages`, `chosen` and `rejected`, messages as {role, content} (as "
    "train.jsonl), `conversations`, `chosen` and `rejected`, messages as {from, value} "
    '(LLaMA-Factory), or `chosen` and `rejected`, whole transcripts with "\\n\\nHuman: " and '
    '"\\n\\nAssistant: " (hh-rlhf)'
)
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def pair_of(question: str, chosen: str, rejected: str) -> Pair:
    """Returns a pair of answers to one question."""
    return {
        "messages": [{"role": "user", "content": question}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
    }


def read_text(file: Path) -> str:
    """Reads the text of a UTF-8 file, which may be compressed as ``.gz``.

    Raises:
        BDPOError: it cannot be read.
    """
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BDPOError(f"{file} cannot be read: {error}") from error


def read_pairs(text: str, name: str) -> list[Pair]:
    """Returns the pairs of :func:`read_rows`, without rows that are not usable."""
    return [pair for _, pair in read_rows(text, name) if pair is not None]


def read_rows(text: str, name: str) -> list[tuple[str, Pair | None]]:
    """Reads the rows of a JSON array or of JSON lines, in one of the :data:`FORMS`.

    Columns beside `messages` are kept.

    Args:
        text: the contents of the file.
        name: the name of the file, for the message.

    Returns:
        For each row, an empty text and the pair; or the reason why it is not usable, and None.

    Raises:
        BDPOError: a row has another form.
    """
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, lines)
        return [_pair(row) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BDPOError(
            f"{name} cannot be read ({type(error).__name__}: {error}). A JSON array or JSON lines "
            f"are wanted, with {FORMS}."
        ) from error


def _pair(row: Mapping[str, Any]) -> tuple[str, Pair | None]:
    if "conversations" in row:
        messages = [_message(turn) for turn in row["conversations"]]
        chosen, rejected = _message(row["chosen"]), _message(row["rejected"])
    elif "messages" in row:
        messages, chosen, rejected = row["messages"], row["chosen"], row["rejected"]
    else:
        *messages, chosen = _turns(row["chosen"])
        *others, rejected = _turns(row["rejected"])
        if others != messages:
            return "transcripts differ before the last answer", None
    roles = [message["role"] for message in (*messages[-1:], chosen, rejected)]
    if roles != ["user", "assistant", "assistant"]:
        return "no answer to a question", None
    texts = [chosen["content"].strip(), rejected["content"].strip()]
    if not all(texts):
        return "response empty", None
    if texts[0] == texts[1]:
        return "identical responses", None
    more = row if "messages" in row else {}
    return "", {**more, "messages": messages, "chosen": chosen, "rejected": rejected}


def _message(turn: Mapping[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _turns(transcript: str) -> list[dict[str, str]]:
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", transcript)
    if before or not parts:
        raise ValueError("a transcript does not begin with 'Human:'")
    return [
        {"role": _SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
