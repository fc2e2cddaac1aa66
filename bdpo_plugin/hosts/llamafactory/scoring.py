"""Runs the reference pass of a LLaMA-Factory configuration without training, for `bdpo mi`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import run_exp
from omegaconf import OmegaConf
from transformers import TrainerCallback

from bdpo_plugin.data.recorded_sources import Source, recording_sources
from bdpo_plugin.hosts.llamafactory.arguments import PREF_LOSS
from bdpo_plugin.hosts.llamafactory.side_effects import SHARES, without_side_effects
from bdpo_plugin.hosts.llamafactory.tokenised import TOKENISED, dataset_pairs, tokenised_row
from bdpo_plugin.inspection.scored_pairs import Scored, find_places, keep_scores, texts
from bdpo_plugin.settings import BDPOError


class _Scored(Exception):
    """Stops LLaMA-Factory's run where training would begin."""

    def __init__(self, dataset: Any) -> None:
        super().__init__("The data has been scored.")
        self.dataset = dataset


class _Stop(TrainerCallback):
    def on_train_begin(self, *args: Any, train_dataloader: Any, **kwargs: Any) -> None:
        raise _Scored(train_dataloader.dataset)


def score(config: Path, output_dir: Path) -> Scored:
    """Scores the pairs of a configuration as `llamafactory-cli train` does.

    Calls LLaMA-Factory's `run_exp` and stops it where training would begin. All other output goes
    to a temporary folder. Scoring runs in one process, whatever the configuration says about
    several.

    Args:
        config: a configuration with `pref_loss: bdpo`, or of another DPO run.
        output_dir: the folder for the scores.

    Raises:
        BDPOError: a run would raise it.
    """
    with TemporaryDirectory(prefix="bdpo-mi-") as folder:
        keys: Any = OmegaConf.to_container(OmegaConf.load(config))  # LLaMA-Factory's own reader
        args = without_side_effects(keys, Path(folder))
        args = {key: value for key, value in args.items() if key not in SHARES}
        args |= {"pref_loss": PREF_LOSS, "bdpo_precompute": True, "do_train": True}
        try:
            with recording_sources() as seen:
                run_exp(args, callbacks=[_Stop()])
        except _Scored as stopped:
            dataset = stopped.dataset
        else:
            raise BDPOError("LLaMA-Factory came to no training, so that nothing was scored.")
        table = keep_scores(Path(args["output_dir"]), output_dir)

    model_args, data_args, *_ = get_train_args(args)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    processor = PairwiseDatasetProcessor(template=template, data_args=data_args, **module)

    def made(source: Source) -> Iterator[tuple[Any, ...] | None]:
        for row in source.made:
            tokens = tokenised_row(processor, row)
            yield _key(tokens) if tokens else None

    sources = seen[: len(data_args.dataset or ())]  # sources of training data are recorded first
    return Scored(
        table,
        texts(dataset_pairs(dataset, "train"), module["tokenizer"]),
        find_places(map(_key, dataset), sources, made),
        sources,
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(row[column]) for column in TOKENISED)
