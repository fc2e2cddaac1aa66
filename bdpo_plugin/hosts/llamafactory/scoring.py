"""The scoring pass of a LLaMA-Factory configuration, without the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.extras.misc import has_tokenized_data
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import run_exp
from omegaconf import OmegaConf
from transformers import TrainerCallback

from bdpo_plugin.hosts.llamafactory.args import PREF_LOSS
from bdpo_plugin.hosts.llamafactory.data import TOKENISED, dataset_pairs
from bdpo_plugin.run.scored import Scored, Source, find_places, read_scores, texts, watched
from bdpo_plugin.settings import BDPOError

#: Keys by which several processes share a model; the pass runs in one.
SHARING = ("deepspeed", "fsdp", "fsdp_config")


class _Scored(Exception):
    """Ends LLaMA-Factory's run where its training would begin."""

    def __init__(self, dataset: Any) -> None:
        super().__init__("The data has been scored.")
        self.dataset = dataset


class _Stop(TrainerCallback):
    def on_train_begin(self, *args: Any, train_dataloader: Any, **kwargs: Any) -> None:
        raise _Scored(train_dataloader.dataset)


def score(config: Path, output_dir: Path) -> Scored:
    """Score the pairs of a configuration as `llamafactory-cli train` does, by its own `run_exp`,
    which is stopped where the training begins. It runs in one process, whatever the configuration
    says of several.

    Args:
        config: with `pref_loss: bdpo`, or another DPO configuration.
        output_dir: in the place of the configuration's.

    Raises:
        BDPOError: what a run would raise.
    """
    args = {
        **OmegaConf.to_container(OmegaConf.load(config)),  # as LLaMA-Factory reads its YAML
        "pref_loss": PREF_LOSS,
        "bdpo_precompute": True,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
        "do_train": True,
        "resume_from_checkpoint": None,
        "report_to": "none",
        "use_swanlab": False,
        "push_to_hub": False,
    }
    for key in SHARING:
        args.pop(key, None)
    if (path := args.get("tokenized_path")) and not has_tokenized_data(path):
        del args["tokenized_path"]  # which it would write
    try:
        with watched() as seen:
            run_exp(args, callbacks=[_Stop()])
    except _Scored as stopped:
        dataset = stopped.dataset
    else:
        raise BDPOError("LLaMA-Factory came to no training, so that nothing was scored.")

    model_args, data_args, *_ = get_train_args(args)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    processor = PairwiseDatasetProcessor(template=template, data_args=data_args, **module)

    def made(source: Source) -> Iterator[tuple[Any, ...] | None]:
        for row in source.made:
            tokens = processor.preprocess_dataset({name: [value] for name, value in row.items()})
            yield _key({k: v[0] for k, v in tokens.items()}) if tokens else None

    sources = seen[: len(data_args.dataset or ())]  # those of the training data come first
    return Scored(
        read_scores(output_dir),
        texts(dataset_pairs(dataset, "train"), module["tokenizer"]),
        find_places(map(_key, dataset), sources, made),
        sources,
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(row[column]) for column in TOKENISED)
