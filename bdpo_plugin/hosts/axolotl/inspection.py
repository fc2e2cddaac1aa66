"""Inspects an Axolotl configuration for `bdpo doctor`, without loading the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import gpu_capabilities, prepare_plugins
from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.recorded_sources import Source, recording_sources
from bdpo_plugin.hosts.axolotl.limits import check_trained
from bdpo_plugin.hosts.axolotl.load_config import load_without_side_effects
from bdpo_plugin.hosts.axolotl.plan import KEYS, plan_of
from bdpo_plugin.hosts.axolotl.rewrite_config import ENTRIES, MARK
from bdpo_plugin.hosts.axolotl.side_effects import DROPPED, without_side_effects
from bdpo_plugin.hosts.trl.tokenised import rendered, tokenised_row
from bdpo_plugin.inspection.configuration import SHOWN, Inspected, chat_template_of, longest
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.score_columns import FILE_ROW


def inspect(keys: Mapping[str, Any]) -> Inspected:
    """Loads and tokenises the data of a configuration as Axolotl and TRL would.

    Args:
        keys: the configuration, as the YAML file has it.

    Raises:
        BDPOError: a run would raise before its model is loaded, or the tokenizer lacks the chat
            template that a dataset needs.
    """
    with TemporaryDirectory(prefix="bdpo-doctor-") as folder, recording_sources() as seen:
        cfg = load_without_side_effects(keys, Path(folder))
        _check_whole(keys)
        if cfg.get(MARK):
            check_trained(cfg)
        _check_template(cfg)
        data = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        tokenizer = load_tokenizer(cfg)
    sources = seen[: len(cfg.datasets)]  # the sources of the training data are recorded first
    length = cfg.sequence_len
    pairs, lengths, prompt_boundary_mismatch = [], [], []
    for number, row in enumerate(data.train_dataset):
        tokenised = tokenised_row(row, tokenizer, length)
        pairs.append(tokenised.pair)
        lengths.append(tokenised.lengths)
        prompt_boundary_mismatch += [number] if tokenised.mismatch else []

    def first(source: Source) -> Iterator[Pair]:
        for row in source.made.select(range(min(SHOWN, len(source.made)))):
            yield tokenised_row(row, tokenizer, length).pair

    def uncut() -> int:
        made = (row for source in sources for row in source.made)
        return longest(tokenised_row(row, tokenizer, None).pair for row in made)

    def texts(source: Source) -> Iterator[str]:
        for row in source.made:
            yield "".join(rendered(row, tokenizer))

    train, evaluated = data.train_dataset, data.eval_dataset
    columns = {"train": train.column_names}
    if evaluated is not None:
        columns["eval"] = evaluated.column_names
    if cfg.test_datasets:
        evaluated = None  # no part of the training data
    kept = len(train) + (len(evaluated) if evaluated is not None else 0)
    loaded = sum(len(source.rows) for source in sources)
    whole = not cfg.dataset_exact_deduplication and sources
    without_template = DictDefault({**cfg, "chat_template": None})
    return Inspected(
        settings=BDPOSettings.from_keys(cfg) if cfg.get(MARK) else BDPOSettings(),
        tokenizer=tokenizer,
        own_template=chat_template_of(load_tokenizer(without_template)),
        pairs=pairs,
        names=list(train[FILE_ROW]) if FILE_ROW in train.column_names else None,
        first=[pair for source in sources[:1] for pair in first(source)],
        lengths=lengths,
        prompt_boundary_mismatch=prompt_boundary_mismatch,
        sources=sources,
        columns=columns,
        rendered=texts,
        cut=sum(
            len(side.prompt_ids) + len(side.completion_ids) == length
            and len(side.completion_ids) < whole_length
            for pair, before in zip(pairs, lengths, strict=True)
            for side, whole_length in zip(pair, before, strict=True)
        ),
        left_out=loaded - kept if whole else 0,
        uncut=uncut,
        keys=KEYS,
        plan=plan_of(cfg),
        resizes=True,
    )


def _check_whole(keys: Mapping[str, Any]) -> None:
    """Validates the configuration with the keys that :func:`without_side_effects` removes.

    Raises whatever Axolotl's validation raises."""
    if not DROPPED & keys.keys():
        return
    whole = DictDefault(copy.deepcopy(dict(keys)))
    whole.plugins = without_side_effects(keys, Path()).get("plugins")
    prepare_plugins(whole)
    capabilities, of_environment = gpu_capabilities()
    validate_config(whole, capabilities=capabilities, env_capabilities=of_environment)


def _check_template(cfg: Any) -> None:
    wanted = [
        dataset
        for dataset in (cfg.get(ENTRIES) or cfg)["datasets"]
        if str(dataset.get("type")).startswith("chat_template")
        and not dataset.get("chat_template_jinja")
        and (dataset.get("chat_template") or cfg.chat_template or "tokenizer_default")
        == "tokenizer_default"
    ]
    name = cfg.tokenizer_config or cfg.base_model
    if wanted and not AutoTokenizer.from_pretrained(name).chat_template:
        raise BDPOError(
            f"The tokenizer of {name} has no chat template, and the dataset's `type: "
            f"{wanted[0]['type']}` needs one. Set `chat_template` to the format that the model was "
            "trained with, `chatml` say."
        )
