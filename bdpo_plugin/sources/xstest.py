"""XSTest (Röttger et al., arXiv 2308.01263): labelled answers to unsafe and unsafe-looking prompts.

Reads a folder of the authors' repository. It has a file ``*MODEL*.csv``, also as ``.gz``, for each
of several models, with the columns of :data:`COLUMNS`.
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
    """One model's answer to a prompt, labelled by people."""

    id: str
    type: str
    prompt: str
    model: str
    text: str
    #: :data:`COMPLIANCE`, :data:`REFUSAL` or :data:`PARTIAL`.
    label: str

    @property
    def unsafe(self) -> bool:
        """Whether the prompt is unsafe. The types of unsafe prompts begin with ``contrast_``."""
        return self.type.startswith("contrast_")


def read_answers(folder: Path) -> list[Answer]:
    """Reads the labelled answers of all models in a folder, ordered by file name and row.

    Raises:
        BDPOError: there are no labelled answers, or a column is missing.
    """
    found = []
    for file in sorted(folder.glob("*.csv*")):
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
        if not rows or "completion" not in rows[0]:  # a file that has the prompts only
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
    """Yields a pair for each full refusal and full compliance to the same prompt.

    For a prompt that has no such pair, yields the reason. The refusal is chosen for an ``unsafe``
    prompt, the compliance for a ``safe`` one. A pair also has the prompt's ``id`` and ``type``, and
    the models that gave the two answers.

    Args:
        answers: the labelled answers.
        types: the types of prompts to use; None for all.
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
