"""Writes some rows of a user's data set in their original format, for `bdpo mi --split`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bdpo_plugin.data.recorded_sources import Source


def write_subset(source: Source, rows: Sequence[int], folder: Path, name: str) -> Path:
    """Writes rows of a data set, in their original order and in the format of their file.

    Rows of a JSON or JSONL file are copied. Data that comes from no such local file, or from part
    of one, is written as JSON lines, as it was loaded.

    Args:
        source: the data set that the rows belong to.
        rows: the positions of the rows in it.
        folder: an existing folder.
        name: the name of the file, without its suffix.
    """
    file, rows = source.file, sorted(rows)
    if file is not None and file.suffix == ".parquet":
        path = folder / f"{name}.parquet"
        source.rows.select(rows).to_parquet(path)
        return path
    if file is not None and file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            if len(every := json.loads(text)) == len(source.rows):
                path = folder / f"{name}.json"
                kept = json.dumps([every[row] for row in rows], ensure_ascii=False, indent=2)
                path.write_text(kept + "\n", encoding="utf-8")
                return path
        elif len(lines := [x for x in text.split("\n") if x.strip()]) == len(source.rows):
            path = folder / f"{name}{file.suffix}"
            path.write_text("".join(f"{lines[row]}\n" for row in rows), encoding="utf-8")
            return path
    path = folder / f"{name}.jsonl"
    source.rows.select(rows).to_json(path, force_ascii=False)
    return path
