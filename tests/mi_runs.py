"""`bdpo mi` on a host's configuration, in a warm process of that host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import warm
from real_runs import run_command


def mi(config: Path, *options: Any, server: warm.Server | None) -> str:
    """What the command says of a configuration."""
    tool = Path(sys.executable).with_name("bdpo")
    return run_command([str(tool), "mi", str(config), *map(str, options)], {}, server).stdout


def pairs(output: Path) -> list[dict[str, Any]]:
    """The pairs of the page."""
    text = (output / "mi.html").read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>")[0]
    return json.loads(data)["pairs"]


def check_rows(output: Path, rows: list[dict[str, Any]], *, cut: bool = False) -> None:
    """Each pair of the page names the row that its texts are from; `cut` where some may be less."""
    found = pairs(output)
    assert found
    for pair in found:
        row = rows[pair["row"]]
        assert pair["label"] == row["query_type"]
        assert row["messages"][-1]["content"] in pair["prompt"]
        for side in ("chosen", "rejected"):
            whole = row[side]["content"].strip()
            assert whole == pair[side] or (cut and whole.startswith(pair[side]) and pair[side])
    assert len({pair["row"] for pair in found}) == len(found)
