"""Inspects an Axolotl configuration for `bdpo doctor`, without loading the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import gpu_capabilities, prepare_plugins
from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.data.user_rows import Source, recording_sources
from bdpo_plugin.hosts.axolotl.limits import check_trained
from bdpo_plugin.hosts.axolotl.loaded import load_for_looking
from bdpo_plugin.hosts.axolotl.rewrite_config import ENTRIES, MARK
from bdpo_plugin.hosts.axolotl.schema import without_effect
from bdpo_plugin.hosts.axolotl.side_effects import LEFT_OUT, for_looking
from bdpo_plugin.hosts.trl.tokenised import rendered
from bdpo_plugin.inspection.configuration import Inspected, Plan
from bdpo_plugin.settings import BDPOError, BDPOSettings


def unknown_keys(keys: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the keys that Axolotl silently drops."""
    return [each.place for each in without_effect(keys)]


def inspect(keys: Mapping[str, Any]) -> Inspected:
    """Loads and tokenises the data of a configuration as Axolotl and TRL would.

    Args:
        keys: the configuration, as the YAML file has it.

    Raises:
        BDPOError: a run would raise before its model is loaded, or the tokenizer lacks the chat
            template that a dataset needs.
    """
    with TemporaryDirectory(prefix="bdpo-doctor-") as folder, recording_sources() as seen:
        cfg = load_for_looking(keys, Path(folder))
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
        pair, before, apart = _tokenised(row, tokenizer, length)
        pairs.append(pair)
        lengths.append(before)
        prompt_boundary_mismatch += [number] if apart else []

    def texts(source: Source) -> Iterator[str]:
        for row in source.made:
            yield "".join(rendered(row, tokenizer))

    evaluated = data.eval_dataset if cfg.val_set_size and not cfg.test_datasets else None
    kept = len(data.train_dataset) + (len(evaluated) if evaluated is not None else 0)
    loaded = sum(len(source.rows) for source in sources)
    whole = not cfg.dataset_exact_deduplication and sources
    return Inspected(
        settings=BDPOSettings.from_keys(cfg) if cfg.get(MARK) else BDPOSettings(),
        tokenizer=tokenizer,
        template=None,
        pairs=pairs,
        lengths=lengths,
        prompt_boundary_mismatch=prompt_boundary_mismatch,
        sources=sources,
        rendered=texts,
        cut=sum(
            len(side.prompt_ids) + len(side.completion_ids) == length
            and len(side.completion_ids) < whole_length
            for pair, before in zip(pairs, lengths, strict=True)
            for side, whole_length in zip(pair, before, strict=True)
        ),
        left_out=loaded - kept if whole else 0,
        length_key="sequence_len",
        plan=_plan(cfg),
    )


def _check_whole(keys: Mapping[str, Any]) -> None:
    """Validates the configuration with the keys that :func:`for_looking` removes.

    Raises whatever Axolotl's validation raises."""
    if not LEFT_OUT & keys.keys():
        return
    whole = DictDefault(copy.deepcopy(dict(keys)))
    whole.plugins = for_looking(keys, Path()).get("plugins")
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


def _tokenised(
    row: dict[str, Any], tokenizer: Any, length: int
) -> tuple[Pair, tuple[int, int], bool]:
    """Tokenises a row as TRL does.

    Returns:
        The pair, the numbers of response tokens (chosen, rejected) before truncation, and whether
        the tokens of the prompt change when a response follows.
    """
    prompt, *wholes = rendered(row, tokenizer)
    special = isinstance(row["prompt"], str)
    end = tokenizer.eos_token or ""
    if special:  # TRL appends EOS to text, but leaves the end of messages to the chat template
        wholes = [whole if whole.endswith(end) else whole + end for whole in wholes]
    front, *both = (
        tokenizer(text, add_special_tokens=special)["input_ids"] for text in (prompt, *wholes)
    )
    sides = []
    for ids in both:
        cut = np.asarray(ids[:length], dtype=np.int64)
        sides.append(Side(cut[: len(front)], cut[len(front) :]))
    before = tuple(len(ids) - len(front) for ids in both)
    apart = any(ids[: len(front)] != front for ids in both)
    return Pair(*sides), (before[0], before[1]), apart


def _plan(cfg: Any) -> Plan:
    adapter = cfg.adapter
    quantised = {"load_in_4bit": 0.56, "load_in_8bit": 1.06}
    half = 4 if cfg.torch_dtype == torch.float32 else 2
    lora = adapter in ("lora", "qlora")
    targets = cfg.lora_target_modules
    return Plan(
        model=cfg.base_model,
        bytes_per_weight=next((size for key, size in quantised.items() if cfg.get(key)), half),
        trained_bytes=4 if adapter else half,
        computed_bytes=half,
        rank=cfg.lora_r if lora else (None if adapter else 0),
        targets=None if cfg.lora_target_linear or not isinstance(targets, list) else targets,
        rows=cfg.micro_batch_size,
        max_length=cfg.sequence_len,
        checkpointing=bool(cfg.gradient_checkpointing),
        eight_bit_optimizer="8bit" in str(cfg.optimizer),
        pass_tokens=BDPOSettings.from_keys(cfg).score_tokens,
        attention=cfg.attn_implementation,
    )
