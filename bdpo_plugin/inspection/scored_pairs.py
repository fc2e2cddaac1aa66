"""Combines the scored pairs of a run with the user's dataset rows, for `bdpo mi`."""

from __future__ import annotations

import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.output.score_file import score_file
from bdpo_plugin.reference.chat_template import as_ids, as_string, template_turns


class Place(NamedTuple):
    """The row that a pair was made from: the position of its source, and the row in it."""

    source: int
    row: int


class Texts(NamedTuple):
    """The decoded texts of a pair.

    Attributes:
        prompt: the whole prompt, with everything that the template writes around the messages.
        query: the prompt from the user's first message to the end of the last one.
        chosen, rejected: the responses, without special tokens.
    """

    prompt: str
    query: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Scored:
    """The B training pairs of a run and their scores.

    Attributes:
        table: B rows, as :func:`~bdpo_plugin.output.score_file.save_scores` writes them.
        texts: (B,) the decoded texts.
        places: (B,) the rows that the pairs were made from; None where it is not known.
        sources: the user's datasets.
    """

    table: pa.Table
    texts: Sequence[Texts]
    places: Sequence[Place | None]
    sources: Sequence[Source]

    def column(self, name: str) -> list[Any] | None:
        """Returns the (B,) values of a column of the user's data, or None if no source has it.

        A value is None if the pair's row is not known or its source lacks the column."""
        if not any(name in source.rows.column_names for source in self.sources):
            return None
        columns = [s.rows[name] if name in s.rows.column_names else None for s in self.sources]
        return [
            None if place is None or (column := columns[place.source]) is None
            else column[place.row]
            for place in self.places
        ]  # fmt: skip


def keep_scores(run: Path, output_dir: Path) -> pa.Table:
    """Copies the scores of a run from its temporary output folder.

    Args:
        run: the output folder of the run.
        output_dir: the scores are copied to its folder ``bdpo``.

    Returns:
        The scores of the training pairs.
    """
    kept = output_dir / "bdpo"
    kept.mkdir(parents=True, exist_ok=True)
    whole = score_file("")
    for file in (run / "bdpo").glob(f"{Path(whole).stem}*.parquet"):
        shutil.copyfile(file, kept / file.name)
    return pq.read_table(kept / whole)


def texts(pairs: Iterable[Pair], tokenizer: Any) -> list[Texts]:
    """Decodes the prompt, the query and the responses of each pair."""
    turns = template_turns(tokenizer)

    def query(prompt: str) -> str:
        if turns and (front := turns.before_query(prompt)) is not None:
            prompt = prompt[len(front) :]
        if turns and (back := turns.after_query(prompt)) is not None:
            prompt = prompt[: len(prompt) - len(back)]
        return str(tokenizer.decode(as_ids(prompt)))

    return [
        Texts(
            tokenizer.decode(chosen.prompt_ids),
            query(as_string(chosen.prompt_ids)).strip(),
            tokenizer.decode(chosen.completion_ids, skip_special_tokens=True).strip(),
            tokenizer.decode(rejected.completion_ids, skip_special_tokens=True).strip(),
        )
        for chosen, rejected in pairs
    ]


def find_places(
    wanted: Iterable[Hashable],
    sources: Sequence[Source],
    keys: Callable[[Source], Iterable[Hashable | None]],
) -> list[Place | None]:
    """Finds the dataset row that each pair was made from.

    Pairs and rows are matched by keys. Of several rows with the same key, the first one that is
    left is taken.

    Args:
        wanted: the key of each pair.
        sources: the user's datasets.
        keys: a function that returns the keys of a source's rows; None for a row that was dropped.
    """
    free: dict[Hashable, deque[Place]] = defaultdict(deque)
    for number, source in enumerate(sources):
        for row, key in enumerate(keys(source)):
            if key is not None:
                free[key].append(Place(number, row))
    return [free[key].popleft() if free.get(key) else None for key in wanted]
