"""Selects pairs of a source and writes them to files, for `bdpo data`."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.atomic import write_whole
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import Pair

#: A label and the pair, or the reason why a row is skipped and None.
Sorted = tuple[str, Pair | None]

#: The entry in dataset_info.json with which LLaMA-Factory reads our pairs.
RANKING = {
    "ranking": True,
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


def select(
    rows: Iterable[Sorted], sizes: Mapping[str, int], *, seed: int = 0, per_prompt: int = 1
) -> tuple[list[Pair], dict[str, int]]:
    """Selects random pairs of each label: as many as `sizes` says, or all if there are fewer.

    Args:
        rows: labels and pairs, as the sources yield them.
        sizes: the number of pairs of each label. All pairs of other labels are taken.
        seed: of the random choice and the order.
        per_prompt: the maximum number of pairs with the same prompt.

    Returns:
        The pairs in random order, and the counts of selected pairs, pairs not needed and skipped
        rows, by label or reason.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    counts: Counter[str] = Counter()
    found: dict[str, list[Pair]] = {}
    met: Counter[str] = Counter()
    for label, pair in shuffled:
        if pair is None:
            counts[label] += 1
            continue
        prompt = json.dumps(pair["messages"])
        met[prompt] += 1
        if met[prompt] > per_prompt:
            counts["duplicate prompt"] += 1
        else:
            found.setdefault(label, []).append(pair)
    taken: list[Pair] = []
    for label, pairs in sorted(found.items()):
        chosen = pairs[: sizes.get(label)]
        taken += chosen
        counts[label] = len(chosen)
        counts[f"{label}, not needed"] = len(pairs) - len(chosen)
    random.Random(seed + 1).shuffle(taken)
    return taken, {name: number for name, number in sorted(counts.items()) if number}


def write(
    pairs: Iterable[Pair], file: Path, *, counts: Mapping[str, int], source: Mapping[str, Any]
) -> None:
    """Writes the pairs as JSON lines, and beside them a manifest and LLaMA-Factory's entry.

    ``STEM.manifest.json`` has `source`, `counts`, a hash of each row and a hash of all rows. The
    dataset is added to ``dataset_info.json`` under the name STEM; other entries there are kept.

    Raises:
        BDPOError: a file cannot be written, or ``dataset_info.json`` cannot be read.
    """
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    manifest = {
        "source": dict(source),
        "counts": dict(counts),
        "pairs": len(lines),
        "hash": digest("".join(lines)),
        "rows": [digest(line) for line in lines],
    }
    known = file.with_name("dataset_info.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets = json.loads(known.read_text("utf-8")) if known.exists() else {}
        datasets[file.stem] = {"file_name": file.name, **RANKING}
        write_whole(file, "".join(lines))
        write_whole(file.with_suffix(".manifest.json"), json.dumps(manifest, indent=1) + "\n")
        write_whole(known, json.dumps(datasets, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise BDPOError(f"{file} and the files beside it cannot be written: {error}") from error


def digest(text: str) -> str:
    """Returns the BLAKE2b digest of a text: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
