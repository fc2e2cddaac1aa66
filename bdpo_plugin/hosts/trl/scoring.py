"""Runs the reference pass without training, for `bdpo mi`.

It takes a configuration of `bdpo train`, or a model and a dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset

from bdpo_plugin.hosts.trl.arguments import parse
from bdpo_plugin.hosts.trl.loading import file_source, load_data, make_trainer, sources_of
from bdpo_plugin.hosts.trl.side_effects import SHARES, without_side_effects
from bdpo_plugin.hosts.trl.tokenised import dataset_pairs
from bdpo_plugin.inspection.scored_pairs import Scored, find_places, keep_scores, texts
from bdpo_plugin.recipes.host_config import read_config
from bdpo_plugin.sources.loading import load_train


def score(config: Path, output_dir: Path) -> Scored:
    """Scores the training pairs of a configuration of `bdpo train`, as that does.

    Scoring runs in one process, whatever the configuration says about several.

    Args:
        config: the YAML file.
        output_dir: the folder for the scores.

    Raises:
        BDPOError: a run would raise it.
    """
    return _score(read_config(config).keys, output_dir)


def score_dataset(model: str, dataset: str, output_dir: Path, max_length: int) -> Scored:
    """Scores preference pairs with the default settings and the model's own chat template.

    Args:
        model: the model's name or folder.
        dataset: a JSON, JSONL or Parquet file, or the name of a dataset on the hub, whose split
            ``train`` is read. Its columns are TRL's, or ``messages`` (``conversations``),
            ``chosen`` and ``rejected`` as in this package's recipes.
        output_dir: the folder for the scores.
        max_length: maximum number of tokens of a pair's longer sequence. Longer ones are truncated.

    Raises:
        BDPOError: a run would raise it.
    """
    source = file_source(dataset)
    rows = load_train("--dataset", dataset, files="a JSON, JSONL or Parquet file", **source)
    cpu = not torch.cuda.is_available()
    keys = {
        "model_name_or_path": model,
        "dataset_name": dataset,
        "max_length": max_length,
        "use_peft": True,  # avoids a second model, the reference
        "lora_target_modules": ["all-linear"],
        "use_cpu": cpu,
        "bf16": not cpu,
    }
    return _score(keys, output_dir, rows)


def _score(keys: Mapping[str, Any], output_dir: Path, rows: Dataset | None = None) -> Scored:
    """Scores the training pairs of a configuration. `rows` are its data, if they are loaded."""
    with TemporaryDirectory(prefix="bdpo-mi-") as folder:
        kept = without_side_effects(keys, Path(folder))
        kept = {key: value for key, value in kept.items() if key not in SHARES}
        arguments = parse({**kept, "bdpo_precompute": True})
        data = load_data(arguments) if rows is None else {"train": rows}
        trainer = make_trainer(arguments, data)
        table = keep_scores(Path(arguments.training.output_dir), output_dir)
    pairs = dataset_pairs(trainer.train_dataset, trainer.data_collator.collator)
    scored = data["train"].select(table["row"].to_pylist())
    sources = sources_of(arguments, data["train"])
    return Scored(
        table,
        texts(pairs, trainer.processing_class),
        find_places(map(_key, scored), sources, lambda source: map(_key, source.rows)),
        sources,
    )


def _key(row: Mapping[str, Any]) -> str:
    """Returns a text that is the same for the same row, whatever the order of its columns."""
    return json.dumps({k: v for k, v in row.items() if v is not None}, sort_keys=True, default=str)
