"""TRL's preference datasets and batches, read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from bdpo_plugin.reference.pairs import Pair, split_sequence
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.trainer.balancer import SCORE_COLUMNS


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward takes."""
    kept = {k: v for k, v in batch.items() if k not in {"completion_mask", *SCORE_COLUMNS}}
    return {**kept, "use_cache": False}


def batch_pairs(batch: Mapping[str, Any]) -> list[Pair]:
    """The pairs of a batch: its first half are the chosen sequences, its second the rejected.

    Args:
        batch: `input_ids`, `attention_mask` and `completion_mask`, each (2B, T).
    """
    missing = {"input_ids", "attention_mask", "completion_mask"} - set(batch)
    if missing:
        raise BDPOError(
            f"The data collator makes no {', '.join(sorted(missing))}: B-DPO reads the batches of "
            "TRL's DataCollatorForPreference. Leave out the option that replaces the collator "
            "(in Axolotl, `pad_to_multiple_of`)."
        )
    rows = [batch[k].tolist() for k in ("input_ids", "attention_mask", "completion_mask")]
    sides = []
    for ids, attended, trained in zip(*rows, strict=True):
        real = [i for i, seen in enumerate(attended) if seen]
        sides.append(split_sequence([ids[i] for i in real], [trained[i] for i in real]))
    half = len(sides) // 2
    return [Pair(*sides) for sides in zip(sides[:half], sides[half:], strict=True)]


def dataset_pairs(
    dataset: Dataset, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[Pair]:
    """All pairs of a tokenised dataset as training will see them, after its truncation."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    pairs: list[Pair] = []
    for rows in dataset.select_columns(columns).iter(batch_size=256):
        examples = [
            dict(zip(columns, row, strict=True)) for row in zip(*rows.values(), strict=True)
        ]
        pairs += batch_pairs(collator(examples))
    return pairs


def misplaced_rows(dataset: Dataset, tokenizer: Any) -> Iterator[int]:
    """Rows whose prompt and response, tokenised together, are not the tokens trained on."""
    if not {"prompt", "chosen", "rejected"} <= set(dataset.column_names):
        return
    for start in range(0, len(dataset), 256):
        rows = [dataset[i] for i in range(start, min(start + 256, len(dataset)))]
        for side in ("chosen", "rejected"):
            texts, special = zip(*(_full_text(row, side, tokenizer) for row in rows), strict=True)
            together = tokenizer(list(texts), add_special_tokens=special[0])["input_ids"]
            for i, (row, ids) in enumerate(zip(rows, together, strict=True)):
                if ids != row["prompt_ids"] + row[f"{side}_ids"]:
                    yield start + i


def _full_text(row: Mapping[str, Any], side: str, tokenizer: Any) -> tuple[str, bool]:
    if isinstance(row["prompt"], str):
        return row["prompt"] + row[side], True
    messages: Sequence[Mapping[str, str]] = row["prompt"] + row[side]
    extra = row.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, tools=row.get("tools"), **extra
    ), False
