"""One run spread over processes in every way that a machine without a GPU has, beside one process.

Usage: python -m soak.engines [--only TEXT]

Each row is six real steps of TRL's BDPOTrainer with gloo. accelerate starts FSDP on accelerators
only, so its rows shard the models by hand, in the place where accelerate would, and the rest of the
run is the trainer's. DeepSpeed (`DS_ACCELERATOR=cpu`) and Axolotl with Ray run where these are
installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soak.processes import Run, Warm

STEPS = 6

#: Rows of a step, over all processes: 1, 2 or 3.
BATCH = 12

#: Largest difference from one process that is one of rounding; nats for scores of a response.
TOLERANCE = {"scores": 2e-3, "losses": 1e-4}

#: Logged by each step; where the scores are not saved, these stand for them.
SCORES = ("bdpo/mi_chosen", "bdpo/mi_rejected", "bdpo/scale", "logps/chosen", "logps/rejected")

PATIENCE = 600.0


@dataclass(frozen=True)
class Row:
    """One way to run: the engine, the number of processes, and what is trained."""

    engine: str
    ranks: int
    adapter: str
    precompute: bool


def rows() -> Iterator[Row]:
    """Those that can be tried in this environment, the one process of each kind first."""
    kinds = [(adapter, when) for adapter in ("lora", "none") for when in (True, False)]
    for kind in kinds:
        yield Row("one process", 1, *kind)
    for ranks in (2, 3):
        for kind in kinds:
            yield Row("DDP", ranks, *kind)
    for engine in ("FSDP1", "FSDP2"):
        yield Row(engine, 2, "lora", False)
        yield Row(engine, 2, "none", False)
        yield Row(engine, 2, "none", True)
    if importlib.util.find_spec("axolotl"):
        yield Row("Axolotl", 1, "none", True)
        if importlib.util.find_spec("ray"):
            yield Row("Axolotl, Ray", 1, "none", True)
    if importlib.util.find_spec("deepspeed"):
        for stage in ("ZeRO-2", "ZeRO-3"):
            for kind in kinds:
                yield Row(stage, 2, *kind)


def train(run: Run) -> None:
    """In each process of a row."""
    import torch.distributed as dist

    from bdpo_plugin import BDPOTrainer
    from bdpo_plugin.demo.tiny import build_tokenizer
    from soak.small import small_trainer, tiny_model

    options = dict(run.options)
    engine = options.pop("engine")
    cls = BDPOTrainer
    if engine.startswith("FSDP"):
        cls = _sharded_by_hand(engine)
        dist.init_process_group("gloo")
        if options["adapter"] == "none":
            options["ref_model"] = _shard(tiny_model(build_tokenizer()), engine)
    elif engine.startswith("ZeRO"):
        import deepspeed.ops

        # a kernel that sums within one machine, minutes to compile; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        options["deepspeed"] = _deepspeed(int(engine[-1]))
    small_trainer(run.folder, cls=cls, **options).train()
    if dist.is_initialized():
        dist.barrier()


def train_axolotl(run: Run) -> None:
    """`axolotl train`, with Ray if the row says so: its worker on the processor, not on a GPU."""
    from soak.kills import write_axolotl

    run.folder.mkdir()
    run.config = run.folder / "axolotl.yml"
    keys = {"max_steps": STEPS, "save_steps": STEPS}
    if "Ray" in run.options["engine"]:
        import ray.train

        scaling = ray.train.ScalingConfig  # Axolotl asks for a GPU in any case
        ray.train.ScalingConfig = lambda **options: scaling(**options | {"use_gpu": False})
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8)
        keys |= {"use_ray": True, "ray_num_workers": 1, "resources_per_worker": {"CPU": 1}}
    write_axolotl(run, run.folder, **keys)
    from axolotl.cli.main import cli

    cli(["train", str(run.config), "--launcher", "python"], standalone_mode=False)
    # a worker of Ray's is a process that does not tell
    state = json.loads((run.folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    lines = [json.dumps(entry) + "\n" for entry in state["log_history"] if "loss" in entry]
    run.steps_file.write_text("".join(lines))


def _sharded_by_hand(engine: str) -> type:
    from bdpo_plugin import BDPOTrainer

    class Sharded(BDPOTrainer):
        def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
            self.accelerator.prepare_model = lambda model, **_: model  # it would wrap it in DDP
            self.model_wrapped = _shard(self.model, engine)
            return super()._prepare_for_training(*args, **kwargs)

    return Sharded


def _shard(model: Any, engine: str) -> Any:
    """A model, or a PEFT model, in FSDP: each layer a unit, and what is left another."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.model.layers
    if engine == "FSDP1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model) or model


def _deepspeed(stage: int) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys((*keys, "gradient_clipping"), "auto"),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }


def measure(warm: Warm, row: Row, folder: Path, one: Run | None) -> tuple[Run, list[str], bool]:
    """Runs a row; returns its run, the cells of its line, and whether it is as it should be."""
    from soak import small

    options = {
        "engine": row.engine,
        "adapter": row.adapter,
        "bdpo_precompute": row.precompute,
        "pairs": 48,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // row.ranks,
        "bdpo_score_tokens": 512,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,  # with an adapter, TRL's own DPO fails with it in ZeRO-3
    }
    run = Run(folder, options, ranks=row.ranks)
    processes = warm.start(run, train_axolotl if "Axolotl" in row.engine else train)
    until = time.monotonic() + PATIENCE
    for process, _ in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    if codes := [process.exitcode for process, _ in processes if process.exitcode]:
        return run, ["", "", f"stops ({codes[0]}): {_reason(run)}"], False
    if one is None:
        return run, ["", "", "what the others are compared with"], True
    differences = []
    found, expected = ({e["step"]: e for e in small.steps(r.steps_file)} for r in (run, one))
    for names in (SCORES, ("loss",)):
        each = [
            {f"{name} {step}": steps[step][name] for step in steps for name in names}
            for steps in (found, expected)
        ]
        differences.append(small.largest_difference(*each))
    if row.precompute:
        differences[0] = small.largest_difference(*map(small.scores, (run.folder, one.folder)))
    good = all(d <= t for d, t in zip(differences, TOLERANCE.values(), strict=True))
    cells = [f"{difference:.1g}" for difference in differences]
    return run, [*cells, "as one process" if good else "differs"], good


def _reason(run: Run) -> str:
    lines = [line for line in run.log_file.read_text().splitlines() if "Error" in line[:60]]
    return lines[0][:200] if lines else f"see {run.log_file}"


@click.command()
@click.option("--only", default="", help="Rows whose engine has this text.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="For the runs.")
def main(only: str, keep: Path | None) -> None:
    """Train in several processes in every way that runs here, and compare with one process."""
    folder = keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DS_ACCELERATOR"] = "cpu"
    warm, alone, faults = Warm(), {}, 0
    table = Table()
    for column in (
        "engine",
        "processes",
        "training",
        "scored",
        "scores differ by [nats]",
        "losses differ by",
        "",
    ):
        table.add_column(column)
    for number, row in enumerate(rows()):
        kind = (row.adapter, row.precompute, "Axolotl" in row.engine)
        if row.engine not in ("one process", "Axolotl") and only not in row.engine:
            continue
        run, cells, good = measure(warm, row, folder / str(number), alone.get(kind))
        alone.setdefault(kind, run)
        faults += not good
        if run is alone[kind] and not good:
            raise SystemExit(f"One process alone {cells[-1]}")
        trained = "LoRA" if row.adapter == "lora" else "full"
        when = "before training" if row.precompute else "in each step"
        table.add_row(row.engine, str(row.ranks), trained, when, *map(escape, cells))
        print(row, cells, flush=True)
    Console(width=150).print(table)
    raise SystemExit(f"{faults} rows are not as one process: see {folder}" if faults else 0)


if __name__ == "__main__":
    main()
