"""XSTest (Röttger et al., arXiv 2308.01263): prompts that look unsafe, and labelled answers.

The folder is that of the authors' repository: for each of several models a file
``*MODEL*.csv``, also as ``.gz``, with the columns of :data:`COLUMNS`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import pair_of, read_text
from bdpo_plugin.sources.selection import Sorted

COLUMNS = ("id", "type", "prompt", "completion", "final_label")
COMPLIANCE, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


class Answer(NamedTuple):
    """One model's answer to a prompt, as people labelled it."""

    id: str
    type: str
    prompt: str
    model: str
    text: str
    #: :data:`COMPLIANCE`, :data:`REFUSAL` or :data:`PARTIAL`.
    label: str

    @property
    def unsafe(self) -> bool:
        """Whether the prompt is: the types of such prompts begin with ``contrast_``."""
        return self.type.startswith("contrast_")


def read_answers(folder: Path) -> list[Answer]:
    """The labelled answers of all models in a folder, by file name, then as they stand.

    Raises:
        BDPOError: there is none, or a column is missing.
    """
    found = []
    for file in sorted(folder.glob("*.csv*")):
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
        if not rows or "completion" not in rows[0]:  # the prompts alone
            continue
        if missing := [column for column in COLUMNS if column not in rows[0]]:
            raise BDPOError(f"{file} has no column {', '.join(missing)}: see {__name__}.")
        model = file.name.partition(".")[0]
        for row in rows:
            text = row["completion"].strip()
            prompt = row["prompt"].strip()
            found.append(Answer(row["id"], row["type"], prompt, model, text, row["final_label"]))
    if not found:
        raise BDPOError(
            f"{folder} has no file of labelled answers: a CSV file for each model is wanted, with "
            f"the columns {', '.join(COLUMNS)}."
        )
    return found


def sort(answers: Iterable[Answer], types: Iterable[str] | None = None) -> Iterator[Sorted]:
    """Of each two answers that can be told apart a pair, or why a prompt has none.

    On an ``unsafe`` prompt a full refusal is chosen and a full compliance rejected, on a ``safe``
    one the reverse. A pair has the prompt's ``id`` and ``type``, and the two answers' models.

    Args:
        types: only prompts of these; all if None.
    """
    wanted = None if types is None else set(types)
    prompts: dict[str, list[Answer]] = {}
    for answer in answers:
        prompts.setdefault(answer.id, []).append(answer)
    for of_prompt in prompts.values():
        first = of_prompt[0]
        if wanted is not None and first.type not in wanted:
            yield "prompt of another type", None
            continue
        refusals = [answer for answer in of_prompt if answer.text and answer.label == REFUSAL]
        helps = [answer for answer in of_prompt if answer.text and answer.label == COMPLIANCE]
        if not refusals or not helps:
            yield "no full refusal" if helps else "no full compliance", None
            continue
        better, worse = (refusals, helps) if first.unsafe else (helps, refusals)
        label = "unsafe" if first.unsafe else "safe"
        for chosen in better:
            for rejected in worse:
                yield (
                    label,
                    {
                        "label": label,
                        **pair_of(first.prompt, chosen.text, rejected.text),
                        "id": first.id,
                        "type": first.type,
                        "chosen_model": chosen.model,
                        "rejected_model": rejected.model,
                        "rejected_safe": not first.unsafe,
                    },
                )
