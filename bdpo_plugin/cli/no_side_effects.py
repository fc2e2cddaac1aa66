"""Turns off telemetry, experiment trackers and the hosts' own output in commands that only inspect
something."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

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


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Context manager in which everything that hosts and their libraries print goes to stderr."""
    with _descriptor(1, 2), redirect_stdout(sys.stderr):
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Context manager in which hosts and their libraries print nothing."""
    with open(os.devnull, "w") as nothing:
        number = nothing.fileno()
        descriptors = _descriptor(1, number), _descriptor(2, number)
        with descriptors[0], descriptors[1], redirect_stdout(nothing), redirect_stderr(nothing):
            yield


@contextmanager
def _descriptor(number: int, target: int) -> Iterator[None]:
    """Sends what is written to a file descriptor, also by C code, to another one."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
