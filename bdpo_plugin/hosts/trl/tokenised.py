"""TRL's preference datasets and batches, read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from bdpo_plugin.data.pairs import Pair, Side, split_sequence
from bdpo_plugin.data.token_ids import token_rows
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.terminal import visible
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.datasets import TRL_COLUMNS

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

#: The texts whose tokens tell. TRL 1.16 ends a prompt where its tokens and those with a response
#: begin to differ, so that what follows is right; TRL 1.9 leaves the prompt as it is, and cuts as
#: many tokens off the text with a response.
_TELLING = ("prompt",) if hasattr(dpo_trainer, "common_prefix_length") else ("chosen", "rejected")


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
    completion_mask = batch["completion_mask"].bool()
    return PreferenceBatch.of(batch, completion_mask, without=("completion_mask", *TRL_COLUMNS))


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
        completion_mask = np.arange(length) >= len(prompt)
        return split_sequence(np.concatenate([prompt, response])[cut], completion_mask[cut])

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


def prompt_boundary_mismatches(
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
                _has_boundary_mismatch,
                batched=True,
                fn_kwargs={"tokenizer": tokenizer},
                remove_columns=dataset.column_names,
                num_proc=workers if workers > 1 else None,
                desc=f"Checking the prompts of the {visible(name)} data",
            )
        found = [start + row for row, mismatch in enumerate(looked["found"]) if mismatch]
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


def _has_boundary_mismatch(
    columns: Mapping[str, list[Any]], tokenizer: Any
) -> dict[str, list[bool]]:
    """Of each row, as a column, whether its prompt ends elsewhere than the response begins."""
    there = [name for name in READ if name in columns]
    rows = [
        dict(zip(there, row, strict=True))
        for row in zip(*(columns[name] for name in there), strict=True)
    ]
    special = isinstance(rows[0]["prompt"], str)
    texts = zip(*(rendered(row, tokenizer, _TELLING) for row in rows), strict=True)
    found = np.zeros(len(rows), dtype=bool)
    for part, of_part in zip(_TELLING, texts, strict=True):
        tokens = tokenizer(list(of_part), add_special_tokens=special)["input_ids"]
        completion_mask = columns["prompt_ids"]
        if part != "prompt":
            completion_mask = list(map(add, completion_mask, columns[f"{part}_ids"]))
        found |= [ours != theirs for ours, theirs in zip(tokens, completion_mask, strict=True)]
    return {"found": found.tolist()}


def rendered(
    row: Mapping[str, Any], tokenizer: Any, parts: Iterable[str] = ("prompt", "chosen", "rejected")
) -> tuple[str, ...]:
    """A row's prompt, prompt with chosen and prompt with rejected, as text, or some of these."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return tuple(prompt if part == "prompt" else prompt + row[part] for part in parts)
    tools = row.get("tools")
    render = partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    )
    return tuple(
        render(prompt, add_generation_prompt=True)
        if part == "prompt"
        else render(prompt + row[part])
        for part in parts
    )
