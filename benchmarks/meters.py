"""What a run measures of itself: times of its phases, and memory."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState

#: Steps in which kernels are chosen and compiled, and memory is taken for the first time.
FIRST_STEPS = 3
#: What the profiler calls the beginning of a kernel, begins so; and what waits for the device.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Clock(TrainerCallback):
    """Times, with the device waited for, of the pass and of the training's begin and end.

    `initialised` is when the host's own trainer was, where the clock is given to it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.in_pass = self.initialised = self.began = self.warmed = self.ended = 0.0
        self.cpu_started = self.cpu_ended = 0.0
        self.steps = 0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> float:
        """The begin of the run, once the model is loaded."""
        self.cpu_started = time.process_time()
        return self.now()

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.initialised = self.now()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == FIRST_STEPS:
            self.warmed = self.now()

    def on_train_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self.ended, self.cpu_ended = self.now(), time.process_time()
        self.steps = state.global_step

    def warm_step(self) -> float | None:
        """Of the steps after the first few, if there are any."""
        steps = self.steps - FIRST_STEPS
        return (self.ended - self.warmed) / steps if steps > 0 else None


class _Profiled(TrainerCallback):
    """Profiles some steps of a training after its first one, and ends it."""

    def __init__(self, steps: int, profiler: Any) -> None:
        self._last, self._profiler = 1 + steps, profiler
        self.steps = 0

    def on_step_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 1:
            self._profiler.start()

    def on_step_end(
        self, _: Any, state: TrainerState, control: TrainerControl, **__: Any
    ) -> TrainerControl:
        if state.global_step == min(self._last, state.max_steps):
            self._profiler.stop()
            self.steps = state.global_step - 1
            control.should_training_stop = True
        return control


def calls_per_step(trainer: Any, steps: int) -> dict[str, float]:
    """Trains once more for some steps under PyTorch's profiler.

    Returns:
        what a step has, on average: ``launches`` of kernels; ``waits`` for the device, of which
        one in all may be the profiler's own; ``reads`` of a tensor's value by Python, on the CPU
        too; and each kind of them by its name.
    """
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])
    seen = _Profiled(steps, profiler)
    trainer.add_callback(seen)
    trainer.train()
    counts = {entry.key: entry.count / seen.steps for entry in profiler.key_averages()}
    of = {
        "launches": {key: n for key, n in counts.items() if key.startswith(_LAUNCHES)},
        "waits": {key: n for key, n in counts.items() if key in _WAITS},
        "reads": {key: n for key, n in counts.items() if key == "aten::_local_scalar_dense"},
    }
    kinds = {key: n for found in of.values() for key, n in found.items()}
    return {name: sum(found.values()) for name, found in of.items()} | kinds


class Memory:
    """In MiB, of the device; on the CPU the resident set of this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated() / 2**20
        else:
            self.loaded = psutil.Process().memory_info().rss / 2**20

    def peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if (status := Path("/proc/self/status")).exists():
            # getrusage's is that of the parent, if that was larger when it started this process
            line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Parts(AbstractContextManager["Parts"]):
    """How long functions take while this is entered, each without what it calls of the others.

    Args:
        now: the time, or several as an array.
        names: of the functions, as ``module:attribute``, where they are looked up; by title.

    Attributes:
        took: by title.
    """

    def __init__(self, now: Callable[[], Any], names: Mapping[str, Iterable[str]]) -> None:
        self._now = now
        self._within: list[Any] = []  # of each running function, what others took within it
        self.took: dict[str, Any] = {title: 0.0 * now() for title in names}
        self._patches = [
            patch.object(*place, self._timed(title, getattr(*place)))
            for title, of_title in names.items()
            for place in map(_place, of_title)
        ]

    def _timed(self, title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                whole = self._now() - start
                self.took[title] = self.took[title] + whole - self._within.pop()
                if self._within:
                    self._within[-1] = self._within[-1] + whole

        return timed

    def __enter__(self) -> Parts:
        for made in self._patches:
            made.start()
        return self

    def __exit__(self, *_: object) -> None:
        for made in self._patches:
            made.stop()


def _place(name: str) -> tuple[Any, str]:
    """``module:Class.method`` -> the class, and the name of the method."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, import_module(module)), attribute
