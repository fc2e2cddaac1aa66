"""Turns off telemetry and experiment trackers in commands that only inspect something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Environment variables that turn off the reporting of hosts and their libraries. Reporting that a
#: configuration turns on by its keys is handled by `side_effects.py` of each host.
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",  # vLLM and others read it too
    "COMET_MODE": "DISABLED",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else transformers asks a service of the hub for it
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else loads of local files are counted too
    "LLAMABOARD_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SWANLAB_MODE": "disabled",
    "USE_RAY": "0",
    "WANDB_MODE": "disabled",
}


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Context manager in which this process and its child processes report nothing.

    Must be entered before a host or one of its libraries is imported."""
    before = dict(os.environ)
    os.environ.update(QUIET)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
