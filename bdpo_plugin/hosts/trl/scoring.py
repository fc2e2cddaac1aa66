"""Runs the reference pass without training, for `bdpo mi`.

It takes a configuration of `bdpo train`, or a model and a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig

from bdpo_plugin.data.user_rows import Source
from bdpo_plugin.hosts.trl.arguments import Arguments, parse
from bdpo_plugin.hosts.trl.config import BDPOConfig
from bdpo_plugin.hosts.trl.loading import as_trl, file_source, load_data, make_trainer
from bdpo_plugin.hosts.trl.side_effects import SHARES, without_side_effects
from bdpo_plugin.hosts.trl.tokenised import dataset_pairs
from bdpo_plugin.hosts.trl.trainer import BDPOTrainer
from bdpo_plugin.inspection.scored_pairs import Place, Scored, find_places, keep_scores, texts
from bdpo_plugin.sources.loading import load_train


def score_config(keys: Mapping[str, Any], output_dir: Path) -> Scored:
    """Scores the training pairs of a configuration of `bdpo train`, as that does.

    Scoring runs in one process, whatever the configuration says about several.

    Args:
        keys: the contents of the YAML file.
        output_dir: the folder for the scores.

    Raises:
        BDPOError: a run would raise it.
    """
    seen: dict[str, Any] = {}
    with TemporaryDirectory(prefix="bdpo-mi-") as folder:
        kept = {
            k: v for k, v in without_side_effects(keys, Path(folder)).items() if k not in SHARES
        }
        arguments = parse({**kept, "bdpo_precompute": True})
        trainer = make_trainer(arguments, load_data(arguments, seen.__setitem__))
        table = keep_scores(Path(arguments.training.output_dir), output_dir)
    pairs = dataset_pairs(trainer.train_dataset, trainer.data_collator.collator)
    rows = seen["train"]
    sources = _sources(arguments, rows)
    return Scored(
        table,
        texts(pairs, trainer.processing_class),
        find_places((_key(rows[row]) for row in table["row"].to_pylist()), sources, _keys),
        sources,
    )


def _sources(arguments: Arguments, rows: Dataset) -> list[Source]:
    """Returns the user's datasets that `rows` were taken from, each as a whole."""
    if not arguments.mixture.datasets:
        name = arguments.script.dataset_name
        return [Source(rows, None, Path(name) if Path(name).is_file() else None)]
    sources = []
    for entry in arguments.mixture.datasets:
        options = {"data_dir": entry.data_dir, "data_files": entry.data_files}
        whole = load_dataset(entry.path, entry.name, **options, split=entry.split)
        if entry.columns is not None:
            whole = whole.select_columns(entry.columns)
        one = isinstance(entry.data_files, str) and Path(entry.data_files).is_file()
        sources.append(Source(whole, None, Path(entry.data_files) if one else None))
    return sources


def _keys(source: Source) -> Iterator[str]:
    return map(_key, source.rows)


def _key(row: Mapping[str, Any]) -> str:
    """Returns a text that is the same for the same row, whatever the order of its columns."""
    return json.dumps({k: v for k, v in row.items() if v is not None}, sort_keys=True, default=str)


def score(model: str, dataset: str, output_dir: Path, max_length: int) -> Scored:
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
    path = Path(dataset)
    source = file_source(dataset)
    rows = load_train("--dataset", dataset, files="a JSON, JSONL or Parquet file", **source)
    cpu = not torch.cuda.is_available()
    with TemporaryDirectory(prefix="bdpo-mi-") as folder:
        trainer = BDPOTrainer(
            model,
            args=BDPOConfig(
                output_dir=folder,
                max_length=max_length,
                report_to=[],
                use_cpu=cpu,
                bf16=not cpu,
            ),
            train_dataset=as_trl(rows),
            peft_config=LoraConfig(target_modules="all-linear"),  # avoids a second, reference model
        )
        table = keep_scores(Path(folder), output_dir)
    pairs = dataset_pairs(trainer.train_dataset, trainer.data_collator.collator)
    return Scored(
        table,
        texts(pairs, trainer.processing_class),
        [Place(0, row) for row in table["row"].to_pylist()],
        [Source(rows, None, path if path.is_file() else None)],
    )
