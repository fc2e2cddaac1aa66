"""Loads the data of a `bdpo train` configuration and makes its trainer, as `trl dpo` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import get_dataset, get_peft_config, get_quantization_config

from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.hosts.trl.arguments import Arguments
from bdpo_plugin.hosts.trl.trainer import BDPOTrainer
from bdpo_plugin.settings import BDPOError

#: Suffix of a file -> the loader of the package datasets.
_LOADERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet"}


def file_source(name: str) -> dict[str, Any]:
    """Returns the arguments of `load_dataset` for a file of pairs; empty if it is no file."""
    path = Path(name)
    if not path.is_file():
        return {}
    return {"path": _LOADERS.get(path.suffix, "json"), "data_files": name}


def load_data(arguments: Arguments) -> dict[str, Any]:
    """Loads the training rows (``train``) and, if the run evaluates, the others (``eval``).

    Args:
        arguments: the configuration. Its `dataset_name` may be a file, which `trl dpo` cannot read.

    Raises:
        BDPOError: there is no such data, or no such split in it.
    """
    script, mixture = arguments.script, arguments.mixture
    set_seed(arguments.training.seed)  # `test_split_size` takes its rows by chance
    if not mixture.datasets and not script.dataset_name:
        raise BDPOError("There is no data: set `dataset_name` or `datasets`.")
    named = f"`dataset_name: {script.dataset_name}`"
    if mixture.datasets:
        paths = (str(entry.data_files or entry.path) for entry in mixture.datasets)
        named = f"`datasets` ({', '.join(paths)})"
    try:
        if mixture.datasets:
            splits = get_dataset(mixture)
        else:
            source = file_source(script.dataset_name) or {"path": script.dataset_name}
            splits = load_dataset(
                **source, name=script.dataset_config, streaming=script.dataset_streaming
            )
    except Exception as error:  # the hub's client can raise anything without a network
        raise BDPOError(
            f"{named} could not be loaded: {str(error).rstrip('.')}. A file of pairs is wanted "
            "(JSON, JSONL, Parquet), a folder of them, or a dataset of the hub and a network."
        ) from error
    mixed = bool(mixture.datasets)  # which has these two names, whatever the keys say
    wanted = {"train": "train" if mixed else script.dataset_train_split}
    if arguments.training.eval_strategy != "no":
        wanted["eval"] = "test" if mixed else script.dataset_test_split
    loaded = {}
    for name, split in wanted.items():
        if split not in splits:
            raise _no_split(arguments, name, split, named, splits)
        loaded[name] = splits[split]
    return loaded


def _no_split(
    arguments: Arguments, name: str, split: str, named: str, splits: Mapping[str, Any]
) -> BDPOError:
    has = f"{named} has no split `{split}`, only {', '.join(map(str, splits))}"
    if name == "train":
        return BDPOError(f"{has}: set `dataset_train_split`.")
    strategy = arguments.training.eval_strategy
    remedy = (
        "Set `test_split_size: 0.05`, say"
        if arguments.mixture.datasets
        else "Set `dataset_test_split` to the one to evaluate on"
    )
    return BDPOError(
        f"{has}, and `eval_strategy: {getattr(strategy, 'value', strategy)}` needs pairs to "
        f'evaluate on. {remedy}, or `eval_strategy: "no"`.'
    )


def make_trainer(arguments: Arguments, data: Mapping[str, Any]) -> BDPOTrainer:
    """Makes the trainer of a configuration, which scores the data.

    Args:
        arguments: the configuration.
        data: the rows of `load_data`.

    Raises:
        BDPOError: a setting cannot be honoured, or the data cannot be trained on.
    """
    training, model = arguments.training, arguments.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    set_seed(training.seed)  # a new adapter begins the same in each run
    return BDPOTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=as_trl(data["train"]),
        eval_dataset=as_trl(data["eval"]) if "eval" in data else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def as_trl(rows: Any) -> Any:
    """Converts rows of messages and two single responses to TRL's form. Keeps other rows as is."""
    columns = rows.column_names or list(next(iter(rows), {}))
    before = next((c for c in ("messages", "conversations") if c in columns), None)
    if before is None or "prompt" in columns:
        return rows

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row[before], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}

    return rows.map(convert, remove_columns=[before])


def sources_of(arguments: Arguments, rows: Dataset) -> list[Source]:
    """Returns the user's datasets that `rows` were taken from, each as a whole."""
    if not arguments.mixture.datasets:
        name = arguments.script.dataset_name
        return [Source(rows, None, Path(name) if Path(name).is_file() else None)]
    sources = []
    for entry in arguments.mixture.datasets:
        options = {"data_dir": entry.data_dir, "data_files": entry.data_files}
        whole = load_dataset(entry.path, entry.name, **options, split=entry.split)
        if entry.columns is not None:
            whole = whole.select_columns(entry.columns)
        one = isinstance(entry.data_files, str) and Path(entry.data_files).is_file()
        sources.append(Source(whole, None, Path(entry.data_files) if one else None))
    return sources
