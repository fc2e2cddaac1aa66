"""hh-rlhf (Bai et al., arXiv 2204.05862): pairs of transcripts, one of which is preferred."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bdpo_plugin.sources.forms import read_rows, read_text
from bdpo_plugin.sources.loading import load_train
from bdpo_plugin.sources.selection import Sorted

HUB = "Anthropic/hh-rlhf"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def sort(
    data: str = HUB, subset: str = SUBSETS[0], revision: str | None = None
) -> Iterator[Sorted]:
    """Yields the label and the pair of each row, or the reason why the row is skipped.

    Args:
        data: a file as the authors published it (JSON lines, also as ``.gz``), or the name of a
            dataset on the hub.
        subset: one of :data:`SUBSETS`. It names the folder on the hub; its first word is the label.
        revision: the revision of the dataset on the hub.

    Raises:
        BDPOError: the data cannot be read.
    """
    if Path(data).is_file():
        text = read_text(Path(data))
    else:
        files = "a file of JSON lines, also as .gz"
        rows = load_train("--data", data, data_dir=subset, revision=revision, files=files)
        text = "\n".join(map(json.dumps, rows))
    label = subset.partition("-")[0]
    for reason, pair in read_rows(text, data):
        yield (reason, None) if pair is None else (label, {"label": label, **pair})
