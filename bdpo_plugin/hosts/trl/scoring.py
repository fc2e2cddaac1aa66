"""The scoring pass of a model and a dataset, without a host's configuration."""

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

#: How a file is loaded, by the end of its name.
_LOADERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet"}


def score(model: str, dataset: str, output_dir: Path, max_length: int) -> Scored:
    """Score preference pairs with the default settings, by TRL's rows and the model's own template.

    Args:
        model: name or folder.
        dataset: a JSON, JSONL or Parquet file, or the name of a dataset of the hub, whose split
            ``train`` is read. Its columns are TRL's, or ``messages`` (``conversations``),
            ``chosen`` and ``rejected`` as in this package's recipes.
        output_dir: where the scores go.
        max_length: tokens of a pair's longer sequence; longer ones are cut.

    Raises:
        BDPOError: what a run would raise.
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
            peft_config=LoraConfig(target_modules="all-linear"),  # so that there is one model only
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
    """Rows of messages before two single ones -> TRL's; others as they are."""
    before = next((c for c in ("messages", "conversations") if c in rows.column_names), None)
    if before is None or "prompt" in rows.column_names:
        return rows

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row[before], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}

    return rows.map(convert, remove_columns=rows.column_names)
