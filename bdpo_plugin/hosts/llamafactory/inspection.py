"""Inspects a LLaMA-Factory configuration for `bdpo doctor`, without loading the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.hparams import DataArguments, get_train_args
from llamafactory.model import load_tokenizer
from omegaconf import OmegaConf

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.recorded_sources import Source, recording_sources
from bdpo_plugin.hosts.llamafactory.arguments import PREF_LOSS
from bdpo_plugin.hosts.llamafactory.hooks import checking_rows
from bdpo_plugin.hosts.llamafactory.plan import KEYS, plan_of
from bdpo_plugin.hosts.llamafactory.side_effects import SHARES, tokenised_data, without_side_effects
from bdpo_plugin.hosts.llamafactory.tokenised import BEFORE, dataset_pairs, row_pair, tokenised_row
from bdpo_plugin.inspection.configuration import SHOWN, Inspected, chat_template_of, longest
from bdpo_plugin.settings import BDPOSettings


def inspect(config: Path) -> Inspected:
    """Loads and tokenises the data of a configuration with LLaMA-Factory's own functions.

    Raises:
        BDPOError: a run would raise before its model is loaded.
    """
    keys: Any = OmegaConf.to_container(OmegaConf.load(config))
    with TemporaryDirectory(prefix="bdpo-doctor-") as folder:
        args = without_side_effects(keys, Path(folder))
        for key in SHARES:  # LLaMA-Factory would require their processes to exist
            args.pop(key, None)
        parts = get_train_args(args)
        model_args, data_args, training_args, finetuning_args, _ = parts
        read = {k: v for part in parts for k, v in vars(part).items()}
        module = load_tokenizer(model_args)
        own_template = chat_template_of(module["tokenizer"])  # the next line may add one
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        with recording_sources() as seen, checking_rows():
            data = get_dataset(
                template, model_args, data_args, training_args, stage="rm", **module
            )["train_dataset"]
    tokenizer = module["tokenizer"]
    processor = PairwiseDatasetProcessor(template=template, data_args=data_args, **module)

    def texts(source: Source) -> Iterator[str]:
        for row in source.made:
            made = tokenised_row(processor, row)
            sides = [made[f"{side}_input_ids"] for side in ("chosen", "rejected")] if made else []
            yield "".join(map(tokenizer.decode, sides))

    def pairs_of(rows: Iterable[Mapping[str, Any]], processor: Any = processor) -> list[Pair]:
        made = (tokenised_row(processor, row) for row in rows)
        return [row_pair(row) for row in made if row]

    @cache
    def uncut() -> int:
        unlimited = copy.copy(processor)
        unlimited.data_args = copy.copy(data_args)
        unlimited.data_args.cutoff_len = 2**31
        return longest(pair for of in sources for pair in pairs_of(of.made, unlimited))

    ours = finetuning_args.pref_loss == PREF_LOSS
    settings = BDPOSettings.from_keys(vars(finetuning_args)) if ours else BDPOSettings()
    pairs = dataset_pairs(data, "train")
    sources = seen[: len(data_args.dataset or ())]
    length = data_args.cutoff_len
    return Inspected(
        settings=settings,
        tokenizer=tokenizer,
        own_template=own_template,
        pairs=pairs,
        names=None,
        first=pairs_of(islice(sources[0].made, SHOWN)) if sources else [],
        lengths=[BEFORE] * len(pairs),
        prompt_boundary_mismatch=None,
        sources=sources,
        columns={},  # none is kept: a control that names one is refused
        rendered=texts,
        # a sequence as long as the limit may be whole
        cut=sum(longest([pair]) >= length for pair in pairs)
        if longest(pairs) >= length and uncut() > length
        else 0,
        left_out=0,
        uncut=uncut,
        keys=KEYS,
        prepared=tokenised_data(keys),
        resizes=bool(model_args.resize_vocab),
        plan=plan_of(read | {"deepspeed": keys.get("deepspeed")}),
    )


def chat_template(keys: Mapping[str, Any], tokenizer: Any) -> str:
    """Returns the template of a configuration as a chat template of transformers (Jinja)."""
    known = ("template", "default_system", "enable_thinking")
    arguments = DataArguments(**{key: keys[key] for key in known if key in keys})
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    return str(template._get_jinja_template(tokenizer))
