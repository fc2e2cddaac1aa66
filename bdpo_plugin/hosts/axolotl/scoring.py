"""The scoring pass of an Axolotl configuration, without the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from axolotl.utils.data.rl import _truncate_long_sequences_rl

from bdpo_plugin.hosts.axolotl.resolve import PLUGIN
from bdpo_plugin.run.scored import Scored, Source, find_places, read_scores, texts, watched
from bdpo_plugin.trainer.data import dataset_pairs

#: Keys by which several processes share a model; the pass runs in one.
SHARING = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version")


def score(config: Path, output_dir: Path) -> Scored:
    """Score the pairs of a configuration as `axolotl train` does, with Axolotl's own functions.

    Its data is prepared anew, in a folder that is gone afterwards. It runs in one process, whatever
    the configuration says of several.

    Args:
        config: with `rl: bdpo`, or `rl: dpo`.
        output_dir: in the place of the configuration's.

    Raises:
        BDPOError: what a run would raise.
    """
    with TemporaryDirectory(prefix="bdpo-mi-") as prepared, watched() as seen:
        plugins = PluginManager.get_instance()
        plugins.register(PLUGIN)  # where `rl: dpo` names none
        cfg = load_cfg(
            str(config),
            rl="bdpo",
            bdpo_precompute=True,
            output_dir=str(output_dir),
            dataset_prepared_path=prepared,
            push_dataset_to_hub=None,
            **dict.fromkeys(SHARING),
        )
        data = plugins.load_datasets(cfg, preprocess=False) or load_preference_datasets(
            cfg=cfg, cli_args=TrainerCliArgs()
        )
        # those of the training data come first
        sources = seen[: sum(bool(dataset["type"]) for dataset in cfg.datasets)]
        trainer, _, tokenizer, *_ = setup_model_and_trainer(cfg, data)
        table = read_scores(output_dir)
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
