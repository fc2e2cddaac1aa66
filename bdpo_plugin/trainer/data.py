"""TRL's preference datasets and batches, read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from bdpo_plugin.pairs import Pair
from bdpo_plugin.run.batch import PreferenceBatch
from bdpo_plugin.run.datasets import TRL_COLUMNS
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.visible import visible

#: What TRL's tokenisation makes of a row.
TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")


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


def dataset_pairs(
    dataset: Dataset, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[Pair]:
    """All pairs of a tokenised dataset as training will see them, after its truncation."""
    pairs: list[Pair] = []
    for rows in dataset.select_columns(list(TOKENISED)).iter(batch_size=256):
        examples = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        pairs += preference_batch(collator(examples)).pairs()
    return pairs


def misplaced_rows(dataset: Dataset, tokenizer: Any, name: str) -> list[int]:
    """Rows whose prompt's tokens change when a response follows; the same in every rank.

    Releases of TRL differ in what they train on then: a response without its first tokens, or a
    prompt without its last. Each rank looks at a share of the rows.
    """
    if not {"prompt", "chosen", "rejected"} <= set(dataset.column_names):
        return []
    state = PartialState()
    blocks = range(0, len(dataset), 256)[state.process_index :: state.num_processes]
    bar = tqdm(
        blocks,
        desc=f"Checking the prompts of the {visible(name)} data",
        disable=not state.is_main_process,
        delay=1,
    )
    found: list[int] = []
    for start in bar:
        rows = [dataset[i] for i in range(start, min(start + 256, len(dataset)))]
        found += [start + i for i in _misplaced(rows, tokenizer)]
    return sorted(gather_object(found))


def _misplaced(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[int]:
    trained = [
        (ids, ids + row["chosen_ids"], ids + row["rejected_ids"])
        for row in rows
        for ids in [row["prompt_ids"]]
    ]
    texts = [rendered(row, tokenizer) for row in rows]
    special = isinstance(rows[0]["prompt"], str)
    tokenised = [
        tokenizer(list(column), add_special_tokens=special)["input_ids"]
        for column in zip(*texts, strict=True)
    ]
    for i, ids in enumerate(zip(*tokenised, strict=True)):
        if ids != trained[i]:
            yield i


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
