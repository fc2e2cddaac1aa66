"""Runs the reference pass of an Axolotl configuration without training, for `bdpo mi`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from axolotl.utils.data.rl import _truncate_long_sequences_rl

from bdpo_plugin.data.recorded_sources import Source, recording_sources
from bdpo_plugin.hosts.axolotl.load_config import load_without_side_effects
from bdpo_plugin.hosts.axolotl.rewrite_config import PLUGIN
from bdpo_plugin.hosts.axolotl.side_effects import SHARES
from bdpo_plugin.hosts.trl.tokenised import dataset_pairs
from bdpo_plugin.inspection.scored_pairs import Scored, find_places, keep_scores, texts


def score(config: Path, output_dir: Path) -> Scored:
    """Scores the pairs of a configuration with Axolotl's own functions, as `axolotl train` does.

    All other output, including prepared data, goes to a temporary folder. Scoring runs in one
    process, whatever the configuration says about several.

    Args:
        config: a configuration with `rl: bdpo` or `rl: dpo`.
        output_dir: the folder for the scores.

    Raises:
        BDPOError: a run would raise it.
    """
    with TemporaryDirectory(prefix="bdpo-mi-") as folder, recording_sources() as seen:
        keys = yaml.safe_load(config.read_text(encoding="utf-8"))
        named = [name for name in keys.get("plugins") or [] if name != PLUGIN]
        ours = {"rl": "bdpo", "bdpo_precompute": True, "plugins": [*named, PLUGIN]}
        cfg = load_without_side_effects(keys | ours, Path(folder), **dict.fromkeys(SHARES))
        plugins = PluginManager.get_instance()
        data = plugins.load_datasets(cfg, preprocess=False) or load_preference_datasets(
            cfg=cfg, cli_args=TrainerCliArgs()
        )
        # the sources of the training data are recorded first
        sources = seen[: len(cfg.datasets)]
        trainer, _, tokenizer, *_ = setup_model_and_trainer(cfg, data)
        table = keep_scores(Path(cfg.output_dir), output_dir)
        final = data.train_dataset.select(table["row"].to_pylist())

        def made(source: Source) -> Iterator[tuple[str, ...]]:
            if cfg.excess_length_strategy == "truncate":
                cut = {"rl": cfg.rl, "tokenizer": tokenizer, "sequence_len": cfg.sequence_len}
                return map(_key, (_truncate_long_sequences_rl(row, **cut) for row in source.made))
            return map(_key, source.made)

        return Scored(
            table,
            texts(dataset_pairs(trainer.train_dataset, trainer.data_collator.collator), tokenizer),
            find_places(map(_key, final), sources, made),
            sources,
        )


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in ("prompt", "chosen", "rejected"))
