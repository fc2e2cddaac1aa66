"""Finds the error in a data file of the user that the host could not load. The hosts call it; it
needs the standard library only."""

from __future__ import annotations

import json
from pathlib import Path


def json_problem(path: Path) -> str | None:
    """Describes the first error in a file of JSON or JSON lines; returns None if there is none.

    Like the readers of the hosts, it accepts either format with either file extension. Line numbers
    count from 1.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return f"line {line} is not text in UTF-8. Save the file as UTF-8"
    except OSError as error:
        return f"it cannot be read ({error.strerror}). Name a file that can be"
    if not text.strip():
        return "it is empty. Give it rows, or leave the dataset out"
    try:
        rows = json.loads(text)
    except ValueError as whole:
        return _line_problem(text, whole)
    if rows == []:
        return "it has no rows. Give it some, or leave the dataset out"
    if not isinstance(rows, list | dict):
        return f"it is {json.dumps(rows)[:80]}, not rows. Write {_FORM}"
    if isinstance(rows, list):
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                return f"row {number} is {json.dumps(row)[:80]}, not an object. Write {_FORM}"
    return None


_FORM = '{"prompt": ..., "chosen": ..., "rejected": ...} or the like'


def _line_problem(text: str, whole: ValueError) -> str | None:
    if text.lstrip().startswith("["):  # one JSON document
        place = f"line {whole.lineno}" if isinstance(whole, json.JSONDecodeError) else "it"
        return f"{place} is no JSON ({whole}). Mend it"
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            return f"line {number} is no JSON ({error}): {line.strip()[:80]!r}. Mend or remove it"
        if not isinstance(row, dict):
            return f"line {number} is {line.strip()[:80]}, not an object. Write {_FORM}"
    return None
