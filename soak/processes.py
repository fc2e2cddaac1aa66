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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.runs import QUIET

_ROOT = Path(__file__).parents[1]

#: On the CPU; one thread, as on tiny models threads only wait for each other.
_ENVIRONMENT = QUIET | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

#: What runs import when they are under way.
_OFTEN = (
    "soak.small",
    "bitsandbytes",
    "peft.tuners.lora.bnb",
    "torchao.quantization",
    "trackio",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.chat_template_utils",
)

#: What a file of the store takes longer: time for a kill to hit it.
_DISK_SECONDS = 0.003

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
        options: of :func:`~soak.small.small_trainer`.
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
        self.context.set_forkserver_preload([*modules, *_OFTEN])
        ours = dict(os.environ)
        path = [str(_ROOT), *filter(None, [ours.get("PYTHONPATH")])]  # or it could not import this
        os.environ |= _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}
        self.context.Process(target=int).start()  # so that no run waits for the imports
        os.environ.clear()
        os.environ.update(ours)  # the server has the others, and so has each run

    def start(self, run: Run, function: Any = None) -> list[tuple[Any, Told]]:
        """The processes of a run, and what each tells; `function` trains in the place of ours."""
        function = function or (_axolotl if run.config else _trl)
        started = []
        port = _free_port()
        for rank in range(run.ranks):
            told = Told.new(self.context)
            process = self.context.Process(target=_main, args=(run, told, rank, port, function))
            process.start()
            started.append((process, told))
        return started

    def call(self, run: Run, function: Callable[..., None], *arguments: Any) -> int:
        """Call a function in a process of its own; returns its exit status once it has ended."""
        process = self.context.Process(target=_logged, args=(run, function, run, *arguments))
        process.start()
        process.join()
        return process.exitcode


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(run: Run, told: Told, rank: int, port: int, function: Callable[[Run], None]) -> None:
    if run.ranks > 1:
        import torch

        # or transformers cannot read the optimizer's state in the second of two ranks on the CPU
        torch.serialization.register_package(
            0, lambda _: None, lambda obj, place: obj if place.startswith("cpu:") else None
        )
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run.ranks),
            "LOCAL_WORLD_SIZE": str(run.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    _tell(told, run)
    _logged(run, function, run)


def _logged(run: Run, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function with both outputs in the run's log, and end this process."""
    log = os.open(run.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo may wait for ever when its groups are torn down


def _trl(run: Run) -> None:
    import torch.distributed as dist

    from soak.small import last_checkpoint, small_trainer

    trainer = small_trainer(run.folder, **run.options)
    trainer.train(resume_from_checkpoint=(last := last_checkpoint(run.folder)) and str(last))
    if dist.is_initialized():
        dist.barrier()  # or the first to end closes what the others still read


def _axolotl(run: Run) -> None:
    from axolotl.cli.main import cli

    cli(["train", str(run.config), "--launcher", "python"], standalone_mode=False)


def _tell(told: Told, run: Run) -> None:
    """Have a run say when it is at work, and its trainer what it logs.

    It is told by what the package uses, as nothing of the package itself is replaced: the bar of
    its pass, the files of its store, the class that the trainers of its hosts are made of.
    """
    from transformers import Trainer

    _tell_pass(told)
    if run.pause:
        _slow_pass(told, run.pause)
    _tell_store(told, str(run.folder / "cache"))
    for method, phase in (("_inner_training_loop", "training"), ("_save_checkpoint", "saving")):
        setattr(Trainer, method, _during(getattr(Trainer, method), told, phase))
    original = Trainer.log

    @wraps(original)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        original(self, logs, *args, **kwargs)
        if "loss" in logs and self.args.process_index == 0:
            entry = {"step": self.state.global_step, **logs}
            with run.steps_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    Trainer.log = log


def _during(function: Callable[..., Any], told: Told, phase: str) -> Callable[..., Any]:
    @wraps(function)
    def told_of(*args: Any, **kwargs: Any) -> Any:
        with told.phase(phase):
            return function(*args, **kwargs)

    return told_of


def _tell_pass(told: Told) -> None:
    """From the making of the pass's bar, which ranks that do not show it make as well, to its
    end."""
    from tqdm.std import tqdm

    begin, end, phase = tqdm.__init__, tqdm.__exit__, ExitStack()

    @wraps(begin)
    def begun(self: Any, *args: Any, **options: Any) -> None:
        if str(options.get("desc")).startswith("Scoring the"):
            phase.enter_context(told.phase("pass"))
        begin(self, *args, **options)

    @wraps(end)
    def ended(self: Any, *error: Any) -> None:
        phase.close()
        end(self, *error)

    tqdm.__init__, tqdm.__exit__ = begun, ended


def _tell_store(told: Told, folder: str) -> None:
    """From the opening of a temporary file in the store to its renaming, as on a slow disk."""
    phase = ExitStack()

    def heard(event: str, of: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and str(of[0]).startswith(folder):
            if event == "os.rename":
                time.sleep(_DISK_SECONDS)
            phase.close()
            if event == "open" and str(of[0]).endswith(".tmp"):
                phase.enter_context(told.phase("store"))

    sys.addaudithook(heard)


def _slow_pass(told: Told, seconds: float) -> None:
    """Have each forward of a language model take that much longer in the pass."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers.generation import GenerationMixin

    def wait(module: Any, _: Any) -> None:
        if isinstance(module, GenerationMixin) and told.name() == "pass":
            time.sleep(seconds)

    register_module_forward_pre_hook(wait)
