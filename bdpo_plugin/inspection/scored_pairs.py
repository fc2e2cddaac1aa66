"""The scored pairs of a dataset beside the user's rows that they were made of."""

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
from bdpo_plugin.data.user_rows import Source
from bdpo_plugin.output.score_file import score_file
from bdpo_plugin.reference.chat_template import as_ids, as_string, template_turns


class Place(NamedTuple):
    """Where a pair is from: the position of its source among all, and its row there."""

    source: int
    row: int


class Texts(NamedTuple):
    """A pair as the model sees it, decoded.

    Attributes:
        prompt: with all that the template writes around the messages.
        query: the prompt without what comes before the user's first message and after the last.
        chosen, rejected: the responses, without special tokens.
    """

    prompt: str
    query: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Scored:
    """The B training pairs of a run that has been scored.

    Attributes:
        table: B rows, as :func:`~bdpo_plugin.output.tables.save_scores` writes them.
        texts: (B,)
        places: (B,) None where a pair's row is not known.
        sources: the user's datasets.
    """

    table: pa.Table
    texts: Sequence[Texts]
    places: Sequence[Place | None]
    sources: Sequence[Source]

    def column(self, name: str) -> list[Any] | None:
        """(B,) the values of a column of the user's data, None where there is none; None if no
        source has such a column."""
        if not any(name in source.rows.column_names for source in self.sources):
            return None
        columns = [s.rows[name] if name in s.rows.column_names else None for s in self.sources]
        return [
            None if place is None or (column := columns[place.source]) is None
            else column[place.row]
            for place in self.places
        ]  # fmt: skip


def keep_scores(run: Path, output_dir: Path) -> pa.Table:
    """Copies the scores of a run whose folder is a temporary one; returns those of its training
    pairs.

    Args:
        run: the output folder of the run.
        output_dir: whose folder ``bdpo`` has them afterwards.
    """
    kept = output_dir / "bdpo"
    kept.mkdir(parents=True, exist_ok=True)
    whole = score_file("")
    for file in (run / "bdpo").glob(f"{Path(whole).stem}*.parquet"):
        shutil.copyfile(file, kept / file.name)
    return pq.read_table(kept / whole)


def texts(pairs: Iterable[Pair], tokenizer: Any) -> list[Texts]:
    """What pairs are, in words."""
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
    """Where what became of a row was made.

    Args:
        wanted: a key of each pair.
        sources: of the user.
        keys: those of the rows of a source; None for a row that became nothing.
    """
    free: dict[Hashable, deque[Place]] = defaultdict(deque)
    for number, source in enumerate(sources):
        for row, key in enumerate(keys(source)):
            if key is not None:
                free[key].append(Place(number, row))
    return [free[key].popleft() if free.get(key) else None for key in wanted]
