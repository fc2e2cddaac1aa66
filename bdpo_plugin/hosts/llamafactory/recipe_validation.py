"""Validates a recipe with LLaMA-Factory's own parser, on any machine, without model and data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from llamafactory.hparams import get_train_args, parser
from llamafactory.hparams.parser import read_args

from bdpo_plugin.settings import unknown_key_message

#: Keys that need a GPU, a launcher or a package which only the machine that trains may have.
_ELSEWHERE = ("deepspeed", "fsdp", "fsdp_config", "bf16", "fp16", "tf32", "report_to")


def problems(config: dict[str, Any], processes: int = 1) -> Iterator[str]:
    """Yields what LLaMA-Factory would refuse in a configuration.

    Args:
        config: the configuration, as its YAML file has it, without `bdpo_recipe`.
        processes: the number of GPUs that it is meant for, of which the parser asks nothing.
    """
    known = {field.name for group in parser._TRAIN_ARGS for field in fields(group) if field.init}
    unknown = sorted(set(map(str, config)) - known)
    for key in unknown:
        yield unknown_key_message(key, known)
    kept = {k: v for k, v in config.items() if k not in (*_ELSEWHERE, *unknown)}
    with tempfile.TemporaryDirectory() as folder:
        here = {"output_dir": folder, "use_cpu": True, "report_to": "none"}
        try:
            get_train_args(read_args(kept | here))
        except (ImportError, TypeError, ValueError) as error:
            yield str(error)
