"""The environment of a command that only looks: no library reports what it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Variables by which hosts and their libraries send nothing to anybody. What a configuration asks
#: for by its keys is in the `side_effects` of each host.
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",  # of vLLM and others too
    "COMET_MODE": "DISABLED",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service of the hub for it
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # of each load of local files too
    "LLAMABOARD_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SWANLAB_MODE": "disabled",
    "USE_RAY": "0",
    "WANDB_MODE": "disabled",
}


@contextmanager
def looking() -> Iterator[None]:
    """While it lasts, this process and what it starts report nothing. To be entered before a host
    or one of its libraries is imported."""
    before = dict(os.environ)
    os.environ.update(QUIET)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
