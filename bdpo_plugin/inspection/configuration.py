"""What the hosts' inspections report about a configuration: its training data and its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.inspection.plan import HostKeys, Plan
from bdpo_plugin.settings import BDPOSettings

#: The number of rows of the data that are shown.
SHOWN = 3


@dataclass(frozen=True)
class Inspected:
    """The training data of a configuration, as the host tokenises it.

    Attributes:
        settings: the settings of B-DPO.
        tokenizer: the tokenizer of the run.
        own_template: the chat template that the tokenizer was saved with; empty if it has none.
        pairs: B pairs after truncation.
        names: (B,) the names of the pairs' rows for the user; None if they are their positions.
        first: the pairs of the first rows of the user's data, in its order.
        lengths: (B,) response tokens (chosen, rejected) before truncation.
        prompt_boundary_mismatch: positions of the rows in which the tokens of the prompt change
            when a response follows; None if the host tokenises prompt and response separately.
        sources: the user's datasets.
        columns: for each dataset of the run, evaluation included, the columns that are kept until
            it is scored.
        rendered: a function that returns the text of each row of a source that the model reads.
        cut: number of pairs that are truncated.
        left_out: number of rows that are dropped because they are longer than the sequence length.
        uncut: a function that returns the tokens of the longest sequence before truncation.
        keys: the keys of the host.
        plan: the properties that determine memory and time.
        resizes: whether the host gives the model an embedding for each token of the tokenizer.
        prepared: the folder of pairs that the host tokenised in an earlier run, if it reads these
            and no other data.
    """

    settings: BDPOSettings
    tokenizer: Any
    own_template: str
    pairs: Sequence[Pair]
    names: Sequence[int | str] | None
    first: Sequence[Pair]
    lengths: Sequence[tuple[int, int]]
    prompt_boundary_mismatch: Sequence[int] | None
    sources: Sequence[Source]
    columns: Mapping[str, Sequence[str]]
    rendered: Callable[[Source], Iterable[str]]
    cut: int
    left_out: int
    uncut: Callable[[], int]
    keys: HostKeys
    plan: Plan
    resizes: bool
    prepared: str | None = None

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return longest(self.pairs)


def longest(pairs: Iterable[Pair]) -> int:
    """Returns the number of tokens of the longest sequence of some pairs."""
    return max((len(s.prompt_ids) + len(s.completion_ids) for p in pairs for s in p), default=0)


def chat_template_of(tokenizer: Any) -> str:
    """Returns the chat templates of a tokenizer, usually one; empty if it has none."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())
