"""Real runs in warm processes that tell which phase they are in, and can be killed there."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

#: The life of a run, in order. "start": models, data, fingerprint, and what follows the pass.
PHASES = ("start", "pass", "store", "training", "saving")


@dataclass
class Told:
    """What a run tells of itself, in memory that it shares with the one that started it.

    Attributes:
        now: index in :data:`PHASES` of the phase that it is in.
        entered: how often each phase was entered.
        since: when each was entered last, by time.monotonic().
        spent: seconds in each, of the times that it was left.
    """

    now: Any
    entered: Any
    since: Any
    spent: Any

    @classmethod
    def new(cls, context: Any) -> Told:
        n = len(PHASES)
        # without locks, which a killed process would take along
        return cls(
            context.RawValue("i", 0),
            context.RawArray("i", n),
            context.RawArray("d", n),
            context.RawArray("d", n),
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        index, before = PHASES.index(name), self.now.value
        self.since[index] = time.monotonic()
        self.entered[index] += 1
        self.now.value = index
        try:
            yield
        finally:
            self.now.value = before
            self.spent[index] += time.monotonic() - self.since[index]

    def name(self) -> str:
        return PHASES[self.now.value]


@dataclass
class Run:
    """What a process is to do.

    Attributes:
        folder: of the run: its output, its scores, its logs.
        options: of :func:`~benchmarks.soak.small.small_trainer`.
        config: an Axolotl YAML, run through Axolotl's command line in the place of TRL's trainer.
        pause: seconds that each forward of the pass takes more, as with a larger model.
        ranks: how many processes share the run.
    """

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    pause: float = 0.0
    ranks: int = 1

    @property
    def steps_file(self) -> Path:
        return self.folder.with_suffix(".steps.jsonl")

    @property
    def log_file(self) -> Path:
        return self.folder.with_suffix(".log")


class Warm:
    """Starts runs from a process in which everything is imported (the standard library's)."""

    def __init__(self, *modules: str) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # the last two are imported when an adapter is made
        often = ["benchmarks.soak.small", "bitsandbytes", "torchao.quantization"]
        self.context.set_forkserver_preload([*modules, *often])

    def start(self, run: Run) -> list[tuple[Any, Told]]:
        """The processes of a run, and what each tells."""
        started = []
        port = _free_port()
        for rank in range(run.ranks):
            told = Told.new(self.context)
            process = self.context.Process(target=_main, args=(run, told, rank, port))
            process.start()
            started.append((process, told))
        return started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(run: Run, told: Told, rank: int, port: int) -> None:
    log = os.open(run.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if run.ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run.ranks),
            "LOCAL_WORLD_SIZE": str(run.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    code = 1
    try:
        _tell(told, run)
        if run.config:
            _axolotl(run.config)
        else:
            _trl(run)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo may wait for ever when its groups are torn down


def _trl(run: Run) -> None:
    import torch.distributed as dist

    from benchmarks.soak.small import last_checkpoint, small_trainer

    trainer = small_trainer(run.folder, **run.options)
    trainer.train(resume_from_checkpoint=(last := last_checkpoint(run.folder)) and str(last))
    if dist.is_initialized():
        dist.barrier()


def _axolotl(config: Path) -> None:
    from axolotl.cli.main import cli

    cli(["train", str(config), "--launcher", "python"], standalone_mode=False)


def _tell(told: Told, run: Run) -> None:
    """Have the parts of a run say when they are at work, and the trainer what it logs."""
    from bdpo_plugin import BDPOTrainer
    from bdpo_plugin.reference import dataset, store

    def during(owner: Any, method: str, phase: str) -> None:
        original = getattr(owner, method)

        @wraps(original)
        def told_of(*args: Any, **kwargs: Any) -> Any:
            with told.phase(phase):
                return original(*args, **kwargs)

        setattr(owner, method, told_of)

    during(dataset, "_compute", "pass")
    during(store.ScoreStore, "add", "store")
    during(BDPOTrainer, "_inner_training_loop", "training")
    during(BDPOTrainer, "_save_checkpoint", "saving")
    if run.pause:
        dataset.score_jobs = _slowed(dataset.score_jobs, run.pause)
    original = BDPOTrainer.log

    @wraps(original)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        original(self, logs, *args, **kwargs)
        if "loss" in logs and self.args.process_index == 0:
            entry = {"step": self.state.global_step} | {k: v for k, v in logs.items()}
            with run.steps_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    BDPOTrainer.log = log


def _slowed(score_jobs: Callable[..., Any], pause: float) -> Callable[..., Any]:
    @wraps(score_jobs)
    def slowed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for found in score_jobs(*args, **kwargs):
            time.sleep(pause)
            yield found

    return slowed
