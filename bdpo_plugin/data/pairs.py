"""Preference pairs as token ids, and the check for pairs that cannot be trained on. All hosts turn
their data into these pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bdpo_plugin.settings import BDPOError


class Side(NamedTuple):
    """One prompt and its completion, (n,) token ids each; training uses the completion's tokens."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray


class Pair(NamedTuple):
    """The chosen and the rejected prompt and completion of a pair, after the host's truncation."""

    chosen: Side
    rejected: Side


def split_sequence(
    input_ids: Sequence[int] | np.ndarray, completion_mask: Sequence[bool] | np.ndarray
) -> Side:
    """Splits one row of a host's batch into prompt and completion.

    Args:
        input_ids: (T,) token ids without padding.
        completion_mask: (T,) True where the host trains on the token.

    Raises:
        ValueError: The tokens that are trained on are not contiguous to the end of the sequence.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    mask = np.asarray(completion_mask, dtype=bool)
    start = int(mask.argmax()) if mask.any() else len(ids)
    if not mask[start:].all():
        raise ValueError("the tokens trained on are not contiguous to the end of the sequence")
    # no position predicts the first token, so no host trains on it
    start = max(start, min(1, len(ids)))
    return Side(ids[:start], ids[start:])


#: The possible problems of a pair, each with its message and whether the pair is still trained on.
PROBLEMS = {
    "empty": ("a response is empty", False),
    "truncated": ("no token of a response is left after truncation", False),
    "identical": ("chosen and rejected are identical", False),
    "blank": ("a response has no text, only special tokens", True),
    "boundary": ("the prompt's tokens are not where the response begins", True),
    "double_bos": ("the prompt begins with two BOS tokens", True),
}


def first_rows(rows: Sequence[int], numbers: Sequence[int | str] | None = None) -> str:
    """Formats the first five of some rows for a message, by the names that the user knows
    (`numbers`; default: positions)."""
    shown = [row if numbers is None else numbers[row] for row in rows[:5]]
    return ", ".join(map(str, shown)) + (", ..." if len(rows) > 5 else "")


@dataclass
class DataReport:
    """The problems found in the pairs of a dataset.

    Attributes:
        name: the name of the dataset.
        total: the number of rows checked.
        rows: the positions of the pairs with each problem, by key of :data:`PROBLEMS`. A pair is
            listed under one problem only.
        numbers: the names by which the user knows the pairs; default: positions.
    """

    name: str
    total: int
    rows: dict[str, list[int]] = field(default_factory=dict)
    numbers: Sequence[int | str] | None = None

    @property
    def dropped(self) -> set[int]:
        """The positions of the pairs that cannot be trained on."""
        return {row for p, rows in self.rows.items() if not PROBLEMS[p][1] for row in rows}

    def lines(self) -> list[str]:
        """Returns one line for each problem found."""
        out = []
        for problem, rows in self.rows.items():
            words, kept = PROBLEMS[problem]
            examples = first_rows(rows, self.numbers)
            fate = "kept" if kept else "dropped"
            out.append(
                f"{len(rows)} of {self.total} pairs of the {self.name} data: {words} "
                f"({fate}; rows {examples})"
            )
        return out

    def raise_if_nothing_left(self) -> None:
        """Raises an error if no pair can be trained on.

        Raises:
            BDPOError: All pairs are dropped.
        """
        if len(self.dropped) == self.total:
            raise BDPOError(
                f"No pair of the {self.name} data can be trained on. {'; '.join(self.lines())}. "
                "Give it pairs of two different responses that fit into the sequence length."
            )


def is_blank(tokenizer: Any, response: np.ndarray) -> bool:
    """Whether the tokens of a response decode to no text."""
    # the end of a turn never takes more tokens than this
    return len(response) <= 8 and not (tokenizer.decode(response, skip_special_tokens=True).strip())


def check_pairs(
    pairs: Iterable[Pair],
    name: str,
    *,
    lengths: Sequence[tuple[int, int]] | None = None,
    bos: int | None = None,
    prompt_boundary_mismatch: Iterable[int] = (),
    is_blank: Callable[[np.ndarray], bool] = lambda ids: False,
    numbers: Sequence[int | str] | None = None,
) -> DataReport:
    """Checks the pairs of a dataset for the problems of :data:`PROBLEMS`.

    Args:
        lengths: the numbers of response tokens (chosen, rejected) of each pair before truncation.
        prompt_boundary_mismatch: the positions of the pairs whose prompt is known not to end where
            the response begins.
    """
    report = DataReport(name, 0, numbers=numbers)
    boundary = set(prompt_boundary_mismatch)
    for row, (chosen, rejected) in enumerate(pairs):
        report.total += 1
        sides = (chosen, rejected)
        if any(not len(side.completion_ids) for side in sides):
            cut = lengths is not None and all(lengths[row])
            problem = "truncated" if cut else "empty"
        elif np.array_equal(chosen.completion_ids, rejected.completion_ids):
            problem = "identical"
        elif any(is_blank(side.completion_ids) for side in sides):
            problem = "blank"
        elif row in boundary:
            problem = "boundary"
        elif bos is not None and any(list(side.prompt_ids[:2]) == [bos, bos] for side in sides):
            problem = "double_bos"
        else:
            continue
        report.rows.setdefault(problem, []).append(row)
    return report
