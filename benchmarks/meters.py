"""What a run measures of itself: times of its phases, and memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerState


class Clock(TrainerCallback):
    """Times, with the device waited for, of the pass and of the training's begin and end.

    `initialised` is when the host's own trainer was, where the clock is given to it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.in_pass = self.initialised = self.began = self.ended = 0.0
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

    def on_train_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self.ended, self.cpu_ended = self.now(), time.process_time()
        self.steps = state.global_step


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
