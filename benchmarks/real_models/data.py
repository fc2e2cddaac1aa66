"""Preference pairs from PKU-SafeRLHF, or from a file with its columns."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

COLUMNS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)


def load_rows(data: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a JSON or JSONL file, or of the split ``train`` of a dataset of the hub.

    Raises:
        click.ClickException: it cannot be loaded, or a column of :data:`COLUMNS` is missing.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    source = {"path": "json", "data_files": data} if Path(data).is_file() else {"path": data}
    try:
        rows = load_dataset(**source, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise click.ClickException(
            f"--data {data} could not be loaded: {error}. A dataset of the hub is wanted, or a "
            "JSON or JSONL file."
        ) from error
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise click.ClickException(
            f"{data} has no column {', '.join(missing)}. Its columns have to be those of "
            f"PKU-Alignment/PKU-SafeRLHF: {', '.join(COLUMNS)}."
        )
    return rows.select_columns(list(COLUMNS))


def choose(row: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """What kind of pair a row is, and the pair as Axolotl reads it.

    Returns:
        ``unsafe``: one of the two responses is safe, and chosen; ``safe``: both are, and the
        better one is chosen; else the reason why the row is left out, and None.
    """
    safe = [bool(row["is_response_0_safe"]), bool(row["is_response_1_safe"])]
    texts = [(row[f"response_{i}"] or "").strip() for i in (0, 1)]
    if not (row["prompt"] or "").strip() or not all(texts):
        return "prompt or response empty", None
    if texts[0] == texts[1]:
        return "identical responses", None
    if safe == [False, False]:
        return "both responses unsafe", None
    chosen = row["better_response_id" if all(safe) else "safer_response_id"]
    if chosen not in (0, 1) or not safe[chosen]:
        return "labels contradict each other", None
    return "safe" if all(safe) else "unsafe", {
        "kind": "safe" if all(safe) else "unsafe",
        "messages": [{"role": "user", "content": row["prompt"].strip()}],
        "chosen": {"role": "assistant", "content": texts[chosen]},
        "rejected": {"role": "assistant", "content": texts[1 - chosen]},
    }


def select(
    rows: Iterable[Mapping[str, Any]], count: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """`count` pairs, half of each kind as far as there are, one for each prompt, in random order.

    The order, and the choice among the pairs of one prompt, do not depend on the seed of a run.

    Returns:
        the pairs; and a count for each kind taken, kind not needed, and reason of :func:`choose`.
    """
    rows = list(rows)
    random.Random(0).shuffle(rows)
    counts: Counter[str] = Counter()
    kinds: dict[str, list[dict[str, Any]]] = {"unsafe": [], "safe": []}
    seen = set()
    for row in rows:
        kind, pair = choose(row)
        if pair is not None and (prompt := pair["messages"][0]["content"]) in seen:
            kind, pair = "prompt met before", None
        if pair is None:
            counts[kind] += 1
            continue
        seen.add(prompt)
        kinds[kind].append(pair)
    taken = []
    for kind, pairs in kinds.items():
        taken += pairs[: count // 2]
        counts[f"{kind} query"] = min(len(pairs), count // 2)
        counts[f"{kind} query, not needed"] = max(0, len(pairs) - count // 2)
    random.Random(1).shuffle(taken)
    return taken, {name: number for name, number in counts.items() if number}


def prepare(data: str, count: int, folder: Path) -> tuple[Path, dict[str, int]]:
    """Write the pairs that all runs share, as JSONL named by its content; see :func:`select`.

    Raises:
        click.ClickException: no pair can be made of `data`.
    """
    pairs, counts = select(load_rows(data), count)
    if not pairs:
        raise click.ClickException(f"{data} gives no pair to train on: {counts}")
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    file = folder / f"pairs-{digest}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
    return file, counts
