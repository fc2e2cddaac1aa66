"""Runs the reference pass on a model and a dataset without a configuration, for `bdpo mi`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from bdpo_plugin.data.user_rows import Source
from bdpo_plugin.hosts.trl.config import BDPOConfig
from bdpo_plugin.hosts.trl.tokenised import dataset_pairs
from bdpo_plugin.hosts.trl.trainer import BDPOTrainer
from bdpo_plugin.inspection.scored_pairs import Place, Scored, keep_scores, texts
from bdpo_plugin.sources.loading import load_train

#: Suffix of a file -> the loader of the package datasets.
_LOADERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet"}


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
    source = {}
    if path.is_file():
        source = {"path": _LOADERS.get(path.suffix, "json"), "data_files": dataset}
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


def as_trl(rows: Dataset) -> Dataset:
    """Converts rows of messages and two single responses to TRL's form. Keeps other rows as is."""
    before = next((c for c in ("messages", "conversations") if c in rows.column_names), None)
    if before is None or "prompt" in rows.column_names:
        return rows

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row[before], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}

    return rows.map(convert, remove_columns=rows.column_names)
