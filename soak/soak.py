"""Two thousand steps with evaluation and saving: does anything grow?

Usage: python -m soak.soak [--steps 2000] [--json FILE]

Each run is a process of its own, of TRL's trainer on a tiny model: LoRA with the pass before
training, and with `bdpo_precompute: false`. Every 50 steps it counts what it holds. Growth is the
slope of a straight line through what was counted in the second half.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from soak.processes import Run, Warm

EVERY = 50
CASES = {"pass before training": True, "bdpo_precompute: false": False}

#: What may grow over a thousand steps: nothing but noise. Objects are not judged, as the log of the
#: host takes some.
ALLOWED = {"memory [MiB]": 8.0, "open files": 0.5, "threads": 0.5, "hooks": 0.5, "tensors": 4.0}


def count(model: Any) -> dict[str, float]:
    """What this process holds."""
    import psutil
    import torch

    gc.collect()
    objects = gc.get_objects()
    modules = list(model.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "memory [MiB]": psutil.Process().memory_info().rss / 2**20,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")) + threading.active_count() - 1,
        "hooks": sum(len(getattr(module, kind)) for module in modules for kind in kinds),
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
        "objects": len(objects),
    }


def soak(run: Run, file: str) -> None:
    """In the process of the run: train, and write what was counted to a file, a line each."""
    from transformers import TrainerCallback

    from soak.small import small_trainer

    class Counter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step % EVERY == 0:
                with open(file, "a") as out:
                    out.write(json.dumps({"step": state.global_step, **count(model)}) + "\n")

    trainer = small_trainer(run.folder, **run.options)
    trainer.add_callback(Counter())
    trainer.train()


def growth(counted: Sequence[dict[str, float]], name: str) -> float:
    """Per thousand steps, over the second half."""
    late = counted[len(counted) // 2 :]
    slope = np.polyfit([c["step"] for c in late], [c[name] for c in late], 1)[0]
    return float(slope) * 1000


def table(case: str, counted: Sequence[dict[str, float]]) -> tuple[Table, list[str]]:
    """Of a run, and what grew too much in it."""
    shown = Table(title=case, title_justify="left")
    half = counted[len(counted) // 2]["step"]
    for column in ("", f"step {counted[0]['step']}", f"step {half}", "last", "largest"):
        shown.add_column(column)
    shown.add_column("growth in 1,000 steps")
    grew = []
    for name in counted[0]:
        if name == "step":
            continue
        values = [entry[name] for entry in counted]
        slope = growth(counted, name)
        of_time = (values[0], values[len(values) // 2], values[-1], max(values))
        shown.add_row(name, *(f"{value:,.0f}" for value in of_time), f"{slope:+.2f}")
        if name in ALLOWED and slope > ALLOWED[name]:
            grew.append(f"{case}: {name} grows by {slope:.2f} in 1,000 steps")
    return shown, grew


@click.command()
@click.option("--steps", default=2000, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path))
def main(steps: int, output: Path | None) -> None:
    """Train for long, and see whether memory, handles, hooks or tensors grow."""
    console, warm, results = Console(width=120), Warm(), {}
    with tempfile.TemporaryDirectory() as name:
        for number, (case, precompute) in enumerate(CASES.items()):
            options = {
                "pairs": 200,
                "eval_pairs": 8,
                "max_steps": steps,
                "eval_strategy": "steps",
                "eval_steps": max(1, steps // 20),
                "save_strategy": "steps",
                "save_steps": max(1, steps // 10),
                "save_total_limit": 2,
                "logging_steps": 10,
                "bdpo_precompute": precompute,
            }
            run = Run(Path(name, str(number)), options)
            counted = Path(f"{run.folder}.counted")
            if code := warm.call(run, soak, str(counted)):
                raise SystemExit(f"{case}: ended with {code}\n{run.log_file.read_text()[-4000:]}")
            results[case] = [json.loads(line) for line in counted.read_text().splitlines()]
    grew = []
    for case, counted in results.items():
        shown, of_case = table(case, counted)
        console.print(shown)
        grew += of_case
    console.print("; ".join(grew) or "Memory, handles, threads, hooks and tensors do not grow.")
    if output:
        output.write_text(json.dumps(results))
    raise SystemExit(bool(grew))


if __name__ == "__main__":
    main()
