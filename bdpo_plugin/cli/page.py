"""The HTML page of `bdpo mi`: one self-contained file in which each pair can be read."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo_plugin.cli.pair_labels import COLOURS, OTHERS
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    from bdpo_plugin.data.recorded_sources import Source
    from bdpo_plugin.inspection.scored_pairs import Scored

#: Maximum characters of a text on the page, so that it stays usable for 20,000 pairs.
_MOST = 6000


def write_page(
    scored: Scored,
    labelled: tuple[str | None, Sequence[str] | None, Mapping[str, str]],
    notes: Sequence[str],
    unit: str,
    title: str,
    path: Path,
) -> Path:
    """Writes an HTML page with the pairs, their texts and their scores.

    The texts are untrusted. They are embedded as data, never as markup, and the page's content
    security policy allows no script but its own.

    Args:
        scored: the pairs.
        labelled: the column that the labels come from, the (B,) labels, and the colours of those
            that have one; None and None for one colour.
        notes: sentences about the whole.
        unit: the unit of the mutual information.
        title: the title of the page.
        path: the file to write.
    """
    label, labels, colours = labelled
    columns = ("mi_chosen", "mi_rejected", "weight_chosen", "weight_rejected")
    numbers = zip(*(scored.table[column].to_pylist() for column in columns), strict=True)
    names = [_named(number, scored.sources) for number in range(len(scored.sources))]
    pairs = [
        {
            "row": place.row if place else None,
            "set": names[place.source] if place and len(names) > 1 else None,
            "label": visible(labels[i]) if labels else None,
            "numbers": [round(number, 6) for number in of_pair],
            **{name: _short(text) for name, text in texts._asdict().items()},
        }
        for i, (texts, place, of_pair) in enumerate(
            zip(scored.texts, scored.places, numbers, strict=True)
        )
    ]
    data = {
        "unit": unit,
        "label": label,
        "colours": {visible(name): colour for name, colour in colours.items()},
        "plain": [COLOURS[0], OTHERS],  # without labels, and of those that are too many
        "notes": [visible(note) for note in notes],
        "pairs": pairs,
    }
    own = Path(__file__).parent
    style, script = ((own / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    path.write_text(
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(visible(title))}</title>\n"
        f"<style>{style}</style></head>\n"
        f"<body><h1>Mutual information: {html.escape(visible(title))}</h1>\n"
        f'<script type="application/json" id="data">{_as_json(data)}</script>\n'
        f"<script>{script}</script></body></html>\n",
        encoding="utf-8",
    )
    return path


def _named(number: int, sources: Sequence[Source]) -> str:
    """Returns the name of a data set: its file, with the folder if two files have the same name."""
    file = sources[number].file
    if file is None:
        return f"data set {number}"
    same = sum(other.file is not None and other.file.name == file.name for other in sources)
    return visible(file.name if same == 1 else f"{file.parent.name}/{file.name}")


def _short(text: str) -> str:
    text = visible(text)
    return text if len(text) <= _MOST else f"{text[:_MOST]} … ({len(text) - _MOST} more characters)"


def _as_json(data: Any) -> str:
    """Returns JSON that can neither end a script element nor begin a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(source: str) -> str:
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"
