"""Writes the model and the data of the demo to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bdpo_plugin.demo.tiny.conversations import demo_prompts, preference_pairs
from bdpo_plugin.demo.tiny.model import build_model, build_tokenizer
from bdpo_plugin.demo.tiny.pretrain import pretrain
from bdpo_plugin.sources.selection import RANKING


def write(
    directory: str | Path,
    *,
    steps: int,
    seed: int = 0,
    train_pairs: int = 256,
    eval_pairs: int = 64,
    progress: bool = True,
    bos: bool = False,
    **model_options: Any,
) -> Path:
    """Writes ``model/``, ``train.jsonl``, ``eval.jsonl`` and ``prompts.txt`` to `directory`.

    Also writes ``dataset_info.json``, which tells LLaMA-Factory about the datasets ``train`` and
    ``eval``.

    Args:
        directory: created if it does not exist. Existing files of the same names are replaced.
        steps: number of pretraining steps. 0 leaves the weights random, 300 make a model that
            generates readable text.
        seed: of the weights, the pretraining text and the pairs.
        train_pairs, eval_pairs: the numbers of pairs, see :func:`preference_pairs`.
        progress: whether to show a progress bar.
        bos: see :func:`build_tokenizer`.
        model_options: passed to :func:`build_model`.

    Returns:
        `directory`.
    """
    directory = Path(directory)
    tokenizer = build_tokenizer(bos=bos)
    model = build_model(tokenizer, seed=seed, **model_options)
    pretrain(model, tokenizer, steps=steps, seed=seed, progress=progress)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    counts = {"train": train_pairs, "eval": eval_pairs}
    splits = {name: preference_pairs(n, seed=seed, split=name) for name, n in counts.items()}
    write_data(directory, splits, demo_prompts())
    return directory


def write_data(
    directory: Path, splits: dict[str, list[dict[str, Any]]], prompts: list[str]
) -> None:
    """Writes ``NAME.jsonl`` for each split, ``prompts.txt`` and ``dataset_info.json``."""
    for split, pairs in splits.items():
        lines = [json.dumps(pair) for pair in pairs]
        (directory / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (directory / "prompts.txt").write_text("".join(f"{p}\n" for p in prompts), encoding="utf-8")
    datasets = {split: {"file_name": f"{split}.jsonl", **RANKING} for split in splits}
    (directory / "dataset_info.json").write_text(json.dumps(datasets, indent=2) + "\n")
