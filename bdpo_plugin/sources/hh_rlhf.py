"""hh-rlhf (Bai et al., arXiv 2204.05862): transcripts of which one is preferred."""

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
    """Of each row its label and pair, or why it is left out.

    Args:
        data: a file as the authors published it (JSON lines, also as ``.gz``), or a dataset of the
            hub.
        subset: of :data:`SUBSETS`; its first word is the label. It names the folder on the hub.
        revision: of the hub's.

    Raises:
        BDPOError: it cannot be read.
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
