"""Inspects a LLaMA-Factory configuration for `bdpo doctor`, without loading the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.hparams import DataArguments, get_train_args
from llamafactory.model import load_tokenizer
from omegaconf import OmegaConf

from bdpo_plugin.data.user_rows import Source, recording_sources
from bdpo_plugin.hosts.llamafactory.arguments import PREF_LOSS
from bdpo_plugin.hosts.llamafactory.hooks import checking_rows
from bdpo_plugin.hosts.llamafactory.side_effects import SHARES, for_looking, tokenised_data
from bdpo_plugin.hosts.llamafactory.tokenised import BEFORE, dataset_pairs
from bdpo_plugin.inspection.configuration import Inspected, Plan
from bdpo_plugin.settings import BDPOSettings


def inspect(config: Path) -> Inspected:
    """Loads and tokenises the data of a configuration with LLaMA-Factory's own functions.

    Raises:
        BDPOError: a run would raise before its model is loaded.
    """
    keys: Any = OmegaConf.to_container(OmegaConf.load(config))
    with TemporaryDirectory(prefix="bdpo-doctor-") as folder:
        args = for_looking(keys, Path(folder))
        for key in SHARES:  # LLaMA-Factory would require their processes to exist
            args.pop(key, None)
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(args)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        with recording_sources() as seen, checking_rows():
            data = get_dataset(
                template, model_args, data_args, training_args, stage="rm", **module
            )["train_dataset"]
    tokenizer = module["tokenizer"]
    processor = PairwiseDatasetProcessor(template=template, data_args=data_args, **module)

    def texts(source: Source) -> Iterator[str]:
        for row in source.made:
            made = processor.preprocess_dataset({name: [value] for name, value in row.items()})
            sides = [made[f"{side}_input_ids"] for side in ("chosen", "rejected")] if made else []
            yield "".join(tokenizer.decode(ids) for side in sides for ids in side)

    ours = finetuning_args.pref_loss == PREF_LOSS
    settings = BDPOSettings.from_keys(vars(finetuning_args)) if ours else BDPOSettings()
    pairs = dataset_pairs(data, "train")
    length = data_args.cutoff_len
    longest = [max(len(s.prompt_ids) + len(s.completion_ids) for s in pair) for pair in pairs]
    return Inspected(
        settings=settings,
        tokenizer=tokenizer,
        template=data_args.template,
        pairs=pairs,
        lengths=[BEFORE] * len(pairs),
        prompt_boundary_mismatch=None,
        sources=seen[: len(data_args.dataset or ())],
        rendered=texts,
        cut=sum(tokens >= length for tokens in longest),
        left_out=0,
        length_key="cutoff_len",
        prepared=tokenised_data(keys),
        plan=_plan(model_args, data_args, training_args, finetuning_args, settings),
    )


def chat_template(keys: Mapping[str, Any], tokenizer: Any) -> str:
    """Returns the template of a configuration as a chat template of transformers (Jinja)."""
    known = ("template", "default_system", "enable_thinking")
    arguments = DataArguments(**{key: keys[key] for key in known if key in keys})
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    return str(template._get_jinja_template(tokenizer))


def _plan(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, settings: Any
) -> Plan:
    half = 4 if model_args.compute_dtype == torch.float32 else 2
    lora = finetuning_args.finetuning_type == "lora"
    full = finetuning_args.finetuning_type == "full"
    targets = finetuning_args.lora_target
    return Plan(
        model=model_args.model_name_or_path,
        bytes_per_weight={4: 0.56, 8: 1.06}.get(model_args.quantization_bit, half)
        if not full
        else (half if finetuning_args.pure_bf16 else 4),
        trained_bytes=half if finetuning_args.pure_bf16 else 4,
        computed_bytes=half,
        rank=finetuning_args.lora_rank if lora else (0 if full else None),
        targets=None if "all" in targets else targets,
        rows=training_args.per_device_train_batch_size,
        max_length=data_args.cutoff_len,
        checkpointing=not model_args.disable_gradient_checkpointing,
        eight_bit_optimizer="8bit" in str(training_args.optim),
        pass_tokens=settings.score_tokens,
        attention={"fa2": "flash_attention_2", "disabled": "eager"}.get(
            str(getattr(model_args.flash_attn, "value", model_args.flash_attn))
        ),
    )
