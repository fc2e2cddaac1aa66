"""`bdpo doctor` in this process, and configurations with planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from commandline import bdpo


def doctor(*arguments: Any) -> tuple[int, dict[str, list[tuple[str, str]]], list[dict[str, str]]]:
    """Its exit status, what it found by name (state, words), and the rows that it showed."""
    code, shown = bdpo("doctor", *map(str, arguments), "--json")
    said = json.loads(shown[shown.index("{") :])
    findings: dict[str, list[tuple[str, str]]] = {}
    for finding in said["findings"]:
        findings.setdefault(finding["name"], []).append((finding["state"], finding["words"]))
    return code, findings, said["rows"]


def fixes(*arguments: Any) -> dict[str, str]:
    """The fix of each check that says one, by name; of several with one name the last."""
    _, shown = bdpo("doctor", *map(str, arguments), "--json")
    said = json.loads(shown[shown.index("{") :])
    return {finding["name"]: finding["fix"] for finding in said["findings"] if finding["fix"]}


def rewrite(path: Path, change: Any) -> None:
    """Change the rows of a JSONL file: `change` takes the number and the row."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call_a_tool(number: int, row: dict[str, Any]) -> None:
    """Rows 1 and 2 ask, and the assistant has called a tool before it answers."""
    if number in (1, 2):
        call = {"type": "function", "function": {"name": "look_up_weather", "arguments": "{}"}}
        row["messages"] += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "user", "content": "Go on."},
        ]


def same_twice(number: int, row: dict[str, Any]) -> None:
    """Rows 0 and 3 have one response on both sides."""
    if number in (0, 3):
        row["rejected"] = row["chosen"]
