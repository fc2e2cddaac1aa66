"""Validates a recipe of `bdpo train` with TRL's own parser, without model and data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from bdpo_plugin.hosts.trl.arguments import KNOWN, parse
from bdpo_plugin.hosts.trl.limits import check_arguments
from bdpo_plugin.settings import BDPOError, unknown_key_message

#: Keys that need a GPU, a launcher or a package which only the machine that trains may have.
ELSEWHERE = ("deepspeed", "fsdp", "fsdp_config", "bf16", "fp16", "tf32", "report_to", "env")


def problems(config: dict[str, Any], processes: int = 1) -> Iterator[str]:
    """Yields what `bdpo train` would refuse in a configuration.

    Args:
        config: the configuration, as its YAML file has it, without `bdpo_recipe`.
        processes: the number of GPUs that it is meant for, of which the parser asks nothing.
    """
    unknown = sorted({*map(str, config)} - KNOWN - {"env"})
    for key in unknown:
        yield unknown_key_message(key, KNOWN)
    kept = {key: v for key, v in config.items() if key not in (*ELSEWHERE, *unknown)}
    with tempfile.TemporaryDirectory() as folder:
        here = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none"}
        try:
            check_arguments(parse(kept | here).training)
        except (BDPOError, ImportError) as error:
            yield str(error)
