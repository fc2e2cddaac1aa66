"""Inspects a configuration of `bdpo train` for `bdpo doctor`, without the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import extract_prompt

from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.hosts.trl.arguments import parse
from bdpo_plugin.hosts.trl.limits import check_arguments
from bdpo_plugin.hosts.trl.loading import as_trl, load_data, sources_of
from bdpo_plugin.hosts.trl.plan import KEYS, plan_of
from bdpo_plugin.hosts.trl.raw_rows import (
    check_datasets,
    check_scorable,
    unreadable_rows_named,
    without_rows,
)
from bdpo_plugin.hosts.trl.recipe_validation import ELSEWHERE
from bdpo_plugin.hosts.trl.side_effects import SHARES, without_side_effects
from bdpo_plugin.hosts.trl.tokenised import rendered, tokenised_row
from bdpo_plugin.inspection.configuration import SHOWN, Inspected, chat_template_of
from bdpo_plugin.settings import BDPOError


def inspect(keys: Mapping[str, Any]) -> Inspected:
    """Loads and tokenises the data of a configuration as `bdpo train` and TRL would.

    Args:
        keys: the configuration, as the YAML file has it.

    Raises:
        BDPOError: a run would raise before its model is loaded.
    """
    with TemporaryDirectory(prefix="bdpo-doctor-") as folder:
        kept = without_side_effects(keys, Path(folder))
        kept = {k: v for k, v in kept.items() if k not in SHARES.union(ELSEWHERE)}
        arguments = parse({**kept, "use_cpu": True, "bf16": False, "report_to": "none"})
        loaded = load_data(arguments)
    training, model = arguments.training, arguments.model
    settings = check_arguments(training)
    limit, mode = training.max_length, training.truncation_mode
    # runs no code of a model's repository, whatever `trust_remote_code` says
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision
    )
    data = {name: as_trl(rows) for name, rows in loaded.items()}
    check_scorable(data.items(), settings)
    train = data["train"]
    if not isinstance(train, Dataset):
        raise BDPOError("The data is a stream, which is checked while it is read in training only")
    empty = check_datasets(data.items(), tokenizer, training.pad_token).get(id(train), [])
    rows = _with_prompt(without_rows(train, empty, "train")[0])
    numbers = sorted({*range(len(train))} - {*empty})
    with unreadable_rows_named(rows, "train", tokenizer):
        tokenised = [tokenised_row(row, tokenizer, limit, mode) for row in rows]
    longest_row = max((row.prompt + max(row.lengths) for row in tokenised), default=0)
    # TRL drops rows of which nothing but the prompt would be left
    fits = [limit is None or mode != "keep_start" or row.prompt < limit for row in tokenised]
    numbers = [number for number, fit in zip(numbers, fits, strict=True) if fit]
    tokenised = [row for row, fit in zip(tokenised, fits, strict=True) if fit]
    sources = [
        Source(source.rows, _with_prompt(as_trl(source.rows)), source.file)
        for source in sources_of(arguments, loaded["train"])
    ]
    whole = [row.prompt + max(row.lengths) for row in tokenised]

    def texts(source: Source) -> Iterator[str]:
        for row in source.made:
            yield "".join(rendered(row, tokenizer))

    first = sources[0].made.select(range(min(SHOWN, len(sources[0].made))))
    return Inspected(
        settings=settings,
        tokenizer=tokenizer,
        own_template=chat_template_of(tokenizer),
        pairs=[row.pair for row in tokenised],
        names=numbers,
        first=[tokenised_row(row, tokenizer, limit, mode).pair for row in first],
        lengths=[row.lengths for row in tokenised],
        prompt_boundary_mismatch=[place for place, row in enumerate(tokenised) if row.mismatch],
        sources=sources,
        columns={name: rows.column_names for name, rows in loaded.items()},
        rendered=texts,
        cut=sum(limit is not None and length > limit for length in whole),
        left_out=fits.count(False),
        uncut=lambda: longest_row,
        keys=KEYS,
        plan=plan_of(keys),
        resizes=False,
    )


def _with_prompt(rows: Dataset) -> Dataset:
    """Takes the prompt out of both responses, as TRL does with rows that have none."""
    return rows if "prompt" in rows.column_names else rows.map(extract_prompt)
