"""A choice among the pairs of a source, and the files that it is written to."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import Pair

#: A label and the pair; or why a row is left out, and None.
Sorted = tuple[str, Pair | None]

#: How LLaMA-Factory reads our pairs.
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
    """Pairs of each label, at random, as many as `sizes` says or as there are.

    Args:
        rows: as the sources sort them.
        sizes: of each label; pairs of a label that it does not name are all taken.
        seed: of the choice and the order.
        per_prompt: the most pairs that a prompt gives.

    Returns:
        the pairs, in random order; and a count for each label taken, label not needed, and reason.
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
            counts["prompt met before"] += 1
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
    """The pairs as JSON lines, with a manifest and LLaMA-Factory's entry beside them.

    ``STEM.manifest.json`` has `source`, `counts` and a hash of each row and of all;
    ``dataset_info.json`` knows the dataset as STEM, and keeps what else it knows.

    Raises:
        BDPOError: a file cannot be written, or ``dataset_info.json`` not be read.
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
    """16 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Put a text into a file at once, so that a kill leaves the one before, or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
