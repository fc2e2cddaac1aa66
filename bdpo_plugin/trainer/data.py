"""TRL's preference datasets and batches, read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import add
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bdpo_plugin.pairs import Pair, Side, split_sequence
from bdpo_plugin.run.batch import PreferenceBatch
from bdpo_plugin.run.datasets import TRL_COLUMNS
from bdpo_plugin.run.token_ids import token_rows
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.visible import visible

#: What TRL's tokenisation makes of a row.
TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")

#: What TRL reads of a row.
READ = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")

#: Rows that are looked at in the time that another process takes to be there.
WORTH_A_PROCESS = 5000

#: How TRL's collator cuts a sequence to so many tokens, by its `truncation_mode`.
_CUTS: dict[str, Callable[[int | None], slice]] = {
    "keep_start": lambda limit: slice(limit),
    "keep_end": lambda limit: slice(None if limit is None else -limit, None),
}

#: Whether TRL lets a prompt end where its tokens and those with a response begin to differ
#: (1.16), or cuts as many tokens as the prompt has off both (1.9).
_SHORTENS = hasattr(dpo_trainer, "common_prefix_length")


def preference_batch(batch: Mapping[str, Any]) -> PreferenceBatch:
    """A batch of TRL's collator: `input_ids`, `attention_mask`, `completion_mask`, each (2B, T).

    Raises:
        BDPOError: another collator has made it.
    """
    missing = {"input_ids", "attention_mask", "completion_mask"} - set(batch)
    if missing:
        raise BDPOError(
            f"The data collator makes no {', '.join(sorted(missing))}: B-DPO reads the batches of "
            "TRL's DataCollatorForPreference. Leave out the option that replaces the collator "
            "(in Axolotl, `pad_to_multiple_of`)."
        )
    trained = batch["completion_mask"].bool()
    return PreferenceBatch.of(batch, trained, without=("completion_mask", *TRL_COLUMNS))


def dataset_pairs(dataset: Dataset, collator: Any) -> list[Pair]:
    """All pairs of a tokenised dataset as training will see them, after its truncation."""
    if type(collator) is not DataCollatorForPreference:
        return _collated(dataset, collator)  # which may do anything
    limit = math.inf if collator.max_length is None else collator.max_length
    cut = _CUTS[collator.truncation_mode](collator.max_length)

    def side(prompt: np.ndarray, response: np.ndarray) -> Side:
        length = len(prompt) + len(response)
        if len(prompt) and length <= limit:
            return Side(prompt, response)
        trained = np.arange(length) >= len(prompt)
        return split_sequence(np.concatenate([prompt, response])[cut], trained[cut])

    return [
        Pair(side(prompt, chosen), side(prompt, rejected))
        for prompt, chosen, rejected in token_rows(dataset, TOKENISED)
    ]


def _collated(
    dataset: Dataset, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[Pair]:
    """The pairs as any collator makes them."""
    pairs: list[Pair] = []
    for rows in dataset.select_columns(list(TOKENISED)).iter(batch_size=256):
        examples = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        pairs += preference_batch(collator(examples)).pairs()
    return pairs


def misplaced_rows(
    dataset: Dataset, tokenizer: Any, name: str, processes: int | None = None
) -> list[int]:
    """Rows whose prompt's tokens change when a response follows; the same in every rank.

    Releases of TRL differ in what they train on then: a response without its first tokens, or a
    prompt without its last. Each rank looks at a share of the rows.

    Args:
        dataset: tokenised by TRL.
        tokenizer: of the run.
        name: of the dataset, on the progress bar.
        processes: that a rank may use, as `dataset_num_proc` says.
    """
    if not {"prompt", "chosen", "rejected"} <= set(dataset.column_names):
        return []
    state = PartialState()
    bounds = [state.process_index + i for i in (0, 1)]
    start, end = (len(dataset) * bound // state.num_processes for bound in bounds)
    found: list[int] = []
    workers = min(processes or 1, (end - start) // WORTH_A_PROCESS)
    if start < end:
        with _bars(shown=state.is_main_process):
            looked = dataset.select(range(start, end)).map(
                _misplaced,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer},
                remove_columns=dataset.column_names,
                num_proc=workers if workers > 1 else None,
                desc=f"Checking the prompts of the {visible(name)} data",
            )
        found = [start + row for row, is_misplaced in enumerate(looked["found"]) if is_misplaced]
    return sorted(gather_object(found))


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Without the progress bars of `datasets`, unless they are to be shown."""
    change = not (shown or are_progress_bars_disabled())
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _misplaced(columns: Mapping[str, list[Any]], tokenizer: Any) -> dict[str, list[bool]]:
    """Of each row, as a column, whether it is misplaced."""
    there = [name for name in READ if name in columns]
    rows = [
        dict(zip(there, row, strict=True))
        for row in zip(*(columns[name] for name in there), strict=True)
    ]
    prompts, *responses = (columns[name] for name in TOKENISED)
    trained = [prompts, *(list(map(add, prompts, ids)) for ids in responses)]
    texts = list(zip(*(rendered(row, tokenizer) for row in rows), strict=True))
    if _SHORTENS:  # then the tokens of prompt and response are those trained on, by construction
        trained, texts = trained[:1], texts[:1]
    special = isinstance(rows[0]["prompt"], str)
    tokenised = [
        tokenizer(list(column), add_special_tokens=special)["input_ids"] for column in texts
    ]
    pairs = zip(zip(*tokenised, strict=True), zip(*trained, strict=True), strict=True)
    return {"found": [ours != theirs for ours, theirs in pairs]}


def rendered(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    """A row's prompt, prompt with chosen and prompt with rejected, as text."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt, prompt + row["chosen"], prompt + row["rejected"]
    tools = row.get("tools")
    render = partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    )
    return (
        render(prompt, add_generation_prompt=True),
        render(prompt + row["chosen"]),
        render(prompt + row["rejected"]),
    )
