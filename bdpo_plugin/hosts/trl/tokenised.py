"""Reads TRL's tokenised preference datasets and batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import add
from typing import Any, NamedTuple

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

#: The columns of rows that TRL has tokenised.
TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")

#: The columns that TRL reads.
READ = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")

#: The number of rows that can be checked in the time that another process needs to start.
WORTH_A_PROCESS = 5000

#: `truncation_mode` of TRL's collator -> the slice that truncates a sequence to a number of tokens.
_CUTS: dict[str, Callable[[int | None], slice]] = {
    "keep_start": lambda limit: slice(limit),
    "keep_end": lambda limit: slice(None if limit is None else -limit, None),
}

#: The texts whose token ids reveal a mismatch at the prompt boundary. TRL 1.16 ends the prompt
#: where its tokens and those of prompt plus response begin to differ, so that the rest is right:
#: the prompt has to be compared. TRL 1.9 leaves the prompt as it is, and removes as many tokens
#: from the beginning of prompt plus response: these two have to be compared.
_SHORTENS_PROMPT = hasattr(dpo_trainer, "common_prefix_length")
_COMPARED = ("prompt",) if _SHORTENS_PROMPT else ("chosen", "rejected")


class TokenisedRow(NamedTuple):
    """A row as TRL tokenises it.

    Attributes:
        pair: the pair after truncation.
        prompt: the number of tokens of the prompt before truncation.
        lengths: the numbers of response tokens (chosen, rejected) before truncation.
        mismatch: whether the tokens of the prompt change when a response follows.
    """

    pair: Pair
    prompt: int
    lengths: tuple[int, int]
    mismatch: bool


def preference_batch(batch: Mapping[str, Any]) -> PreferenceBatch:
    """Converts a batch of TRL's collator to a :class:`PreferenceBatch`.

    Args:
        batch: with `input_ids`, `attention_mask` and `completion_mask`, each (2B, T).

    Raises:
        BDPOError: another collator has made the batch.
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
    """Returns all pairs of a tokenised dataset, truncated as in training."""
    if type(collator) is not DataCollatorForPreference:
        return _collated(dataset, collator)  # another collator may do anything
    how = collator.max_length, collator.truncation_mode
    return [
        Pair(_truncated(prompt, chosen, *how), _truncated(prompt, rejected, *how))
        for prompt, chosen, rejected in token_rows(dataset, TOKENISED)
    ]


def _truncated(prompt: np.ndarray, response: np.ndarray, limit: int | None, mode: str) -> Side:
    """Truncates a prompt with its response as TRL's collator does."""
    length = len(prompt) + len(response)
    if len(prompt) and (limit is None or length <= limit):
        return Side(prompt, response)
    cut, completion_mask = _CUTS[mode](limit), np.arange(length) >= len(prompt)
    return split_sequence(np.concatenate([prompt, response])[cut], completion_mask[cut])


def _collated(
    dataset: Dataset, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[Pair]:
    """Returns the pairs of the batches that an arbitrary collator makes."""
    pairs: list[Pair] = []
    for rows in dataset.select_columns(list(TOKENISED)).iter(batch_size=256):
        examples = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        pairs += preference_batch(collator(examples)).pairs()
    return pairs


def tokenised_row(
    row: Mapping[str, Any], tokenizer: Any, limit: int | None, mode: str = "keep_start"
) -> TokenisedRow:
    """Tokenises a row as TRL does, for commands that do not make a trainer.

    Args:
        row: the row, with a prompt.
        tokenizer: the tokenizer of the run.
        limit: maximum number of tokens of a sequence; None for no limit.
        mode: TRL's `truncation_mode`.
    """
    prompt, *wholes = rendered(row, tokenizer)
    special = isinstance(row["prompt"], str)
    end = tokenizer.eos_token or ""
    if special:  # TRL appends EOS to text, but leaves the end of messages to the chat template
        wholes = [whole if whole.endswith(end) else whole + end for whole in wholes]
    front, *both = (
        tokenizer(text, add_special_tokens=special)["input_ids"] for text in (prompt, *wholes)
    )
    mismatch = any(ids[: len(front)] != front for ids in both)
    if mismatch and _SHORTENS_PROMPT:
        same = (dpo_trainer.common_prefix_length(front, ids) for ids in both)
        front = front[: min(same)]
    responses = [np.array(ids[len(front) :], dtype=np.int64) for ids in both]
    begin = np.array(front, dtype=np.int64)
    pair = Pair(*(_truncated(begin, response, limit, mode) for response in responses))
    return TokenisedRow(pair, len(front), (len(responses[0]), len(responses[1])), mismatch)


def prompt_boundary_mismatches(
    dataset: Dataset, tokenizer: Any, name: str, processes: int | None = None
) -> list[int]:
    """Returns the rows in which the tokens of the prompt change when a response follows.

    Releases of TRL differ in what they train on in such rows: a response without its first tokens,
    or a prompt without its last ones. Each rank checks a share of the rows, and all ranks return
    the same result.

    Args:
        dataset: a dataset that TRL has tokenised.
        tokenizer: the tokenizer of the run.
        name: the name of the dataset, for the progress bar.
        processes: the number of processes that each rank may use (`dataset_num_proc`).
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
    """Context manager that disables the progress bars of `datasets` unless `shown`."""
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
    """Computes for each row whether its prompt ends elsewhere than the response begins."""
    there = [name for name in READ if name in columns]
    rows = [
        dict(zip(there, row, strict=True))
        for row in zip(*(columns[name] for name in there), strict=True)
    ]
    special = isinstance(rows[0]["prompt"], str)
    texts = zip(*(rendered(row, tokenizer, _COMPARED) for row in rows), strict=True)
    found = np.zeros(len(rows), dtype=bool)
    for part, of_part in zip(_COMPARED, texts, strict=True):
        tokens = tokenizer(list(of_part), add_special_tokens=special)["input_ids"]
        completion_mask = columns["prompt_ids"]
        if part != "prompt":
            completion_mask = list(map(add, completion_mask, columns[f"{part}_ids"]))
        found |= [ours != theirs for ours, theirs in zip(tokens, completion_mask, strict=True)]
    return {"found": found.tolist()}


def rendered(
    row: Mapping[str, Any], tokenizer: Any, parts: Iterable[str] = ("prompt", "chosen", "rejected")
) -> tuple[str, ...]:
    """Renders a row's prompt, prompt with chosen and prompt with rejected as text.

    Args:
        row: the row, by column.
        tokenizer: its chat template renders conversations.
        parts: which of the three texts to render.
    """
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
