"""The labels that colour the pairs of `bdpo mi`, in its picture and on its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import click

if TYPE_CHECKING:
    from bdpo_plugin.inspection.scored_pairs import Scored

#: The palette of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: The colours of the labels that `bdpo data` and the demos write.
_USUAL = {"safe": COLOURS[0], "unsafe": COLOURS[1]}
#: The colour of the labels that the palette has no colour for.
OTHERS = "#999999"


def find_labels(scored: Scored, wanted: str | None) -> tuple[str | None, list[str] | None]:
    """Returns the name of the column that colours the pairs, and its values as text.

    Args:
        scored: the pairs.
        wanted: the column that the user named. Without one it is `label`, or else the only column
            with a few different texts.

    Raises:
        click.ClickException: there is no such column.
    """
    if wanted is not None:
        if (values := scored.column(wanted)) is None:
            columns = sorted({c for source in scored.sources for c in source.rows.column_names})
            raise click.ClickException(
                f"--label {wanted}: the data has no such column, only {', '.join(columns)}"
            )
        return wanted, [str(value) for value in values]
    found = {}
    for source in scored.sources:
        for column, feature in source.rows.features.items():
            if getattr(feature, "dtype", None) == "string" and (values := scored.column(column)):
                texts = [v for v in values if v is not None]
                if not all(isinstance(v, str) for v in texts):
                    continue  # in another data set the column holds messages, for example
                few = set(texts)
                if 1 < len(few) <= min(len(COLOURS), len(values) // 2):
                    found[column] = [str(value) for value in values]
    if "label" not in found and len(found) != 1:
        return None, None
    name = "label" if "label" in found else next(iter(found))
    return name, found[name]


def label_colours(labels: Sequence[str] | None) -> dict[str, str]:
    """Returns a colour for each of the most frequent labels, sorted by name.

    A label's name decides its colour, so that it has the same one in each picture and in other data
    (the next free one where two names would have the same). Labels beyond the palette have none.
    """
    frequent = sorted(Counter(labels or ()).items(), key=lambda item: (-item[1], item[0]))
    names = sorted(name for name, _ in frequent[: len(COLOURS)])
    chosen = {name: _USUAL[name] for name in names if name in _USUAL}
    for name in names:
        if name in chosen:
            continue
        first = crc32(name.encode()) % len(COLOURS)
        order = (*COLOURS[first:], *COLOURS[:first])
        chosen[name] = next(colour for colour in order if colour not in chosen.values())
    return {name: chosen[name] for name in names}
