"""Runs that are killed at random moments and started again, beside undisturbed ones.

Usage: python -m soak.kills [--kills 100] [--seed 0] [--work FOLDER]

Of every 20 kills 7 hit a LoRA run of TRL's trainer, 6 a full fine-tune, 3 one rank of two, and 4 a
full fine-tune by `axolotl train` (where Axolotl is not installed, LoRA runs take its place). Each
is a SIGKILL; then the run is started again as a user would, from its last checkpoint, is perhaps
killed again, and in the end has to be what the undisturbed run is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from soak.processes import PHASES, Run, Told, Warm

STEPS, SAVE_STEPS, PAIRS = 30, 5, 240

#: Of 20 kills, how many hit which phase.
SHARES = {"start": 2, "pass": 6, "store": 2, "training": 5, "saving": 5}
KINDS = {"TRL, LoRA": 7, "TRL, full": 6, "one of two ranks": 3, "axolotl train, full": 4}

#: Largest difference from the undisturbed run that is one of rounding: another start of the pass
#: puts other sequences in a batch. Nats for the scores, of a whole response.
TOLERANCE = {"scores": 2e-3, "losses": 1e-4, "weights": 1e-4}

#: Seconds after which a process that should have ended counts as hanging.
PATIENCE = 120.0


@dataclass
class Kill:
    """One that took place.

    Attributes:
        phase: in which the process was.
        scoring_lost: seconds of scoring since something was stored last.
        steps_lost: steps of training since the last whole checkpoint.
        others_after: seconds until the other ranks had stopped too.
    """

    phase: str
    scoring_lost: float
    steps_lost: int
    others_after: float = 0.0


@dataclass
class Life:
    """One run with all its kills, and how its end differs from the undisturbed run's.

    Attributes:
        differences: the largest of each of :data:`TOLERANCE`.
        refused: how often a checkpoint was refused and had to be put aside.
        faults: what must not be, in words.
    """

    kind: str
    kills: list[Kill] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    refused: int = 0
    faults: list[str] = field(default_factory=list)


class Undisturbed:
    """A run to the end: what others are measured against, and how long its phases last."""

    def __init__(self, warm: Warm, run: Run) -> None:
        self.run = run
        started = time.monotonic()
        processes = warm.start(run)
        _end(processes, PATIENCE)
        told = processes[0][1]
        if any(process.exitcode for process, _ in processes):
            raise RuntimeError(f"The undisturbed run failed: see {run.log_file}")
        self.seconds = {"start": told.since[PHASES.index("pass")] - started}
        for index, phase in enumerate(PHASES[1:], start=1):
            once = phase in ("store", "saving")
            self.seconds[phase] = told.spent[index] / (told.entered[index] if once else 1)
        self.writes = told.entered[PHASES.index("store")]


def live(warm: Warm, whole: Undisturbed, kind: str, folder: Path, phases: list[str], rng) -> Life:
    """One run, killed in each of `phases`, as far as they come, and started until it is done."""
    run, life = _fresh(whole.run, folder), Life(kind)
    for phase in [*sorted(phases, key=PHASES.index), None]:
        while True:
            _age_leftovers(run.folder)
            processes = warm.start(run)
            kill = _kill(run, processes, phase, whole, rng) if phase else None
            hang = _end(processes, PATIENCE)
            if kill:
                life.kills.append(replace(kill, others_after=hang))
                if hang >= PATIENCE:
                    life.faults.append(f"the other rank still ran {hang:.0f} s after the kill")
                break
            if not any(process.exitcode for process, _ in processes):
                if phase:  # it was done before that phase came
                    _compare(life, whole.run, run)
                    return life
                break
            if not _put_aside(run, life):
                life.faults.append(f"it did not start again: see {run.log_file}")
                return life
    _compare(life, whole.run, run)
    return life


def _fresh(run: Run, folder: Path) -> Run:
    """The same run in a folder of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = replace(run, folder=folder)
    if run.config:
        fresh.config = folder.with_suffix(".yml")
        fresh.config.write_text(run.config.read_text().replace(str(run.folder), str(folder)))
    return fresh


def _age_leftovers(folder: Path) -> None:
    """Let a day pass for the temporary files, which the store removes by their age."""
    for file in folder.rglob("*.tmp"):
        os.utime(file, (time.time() - 86400,) * 2)


def _kill(run: Run, processes: list, phase: str, whole: Undisturbed, rng) -> Kill | None:
    """Kills a rank at a random moment of a phase; None if the run ends before."""
    victim, told = rng.choice(processes)
    begun, moment, index = time.monotonic(), rng.random(), PHASES.index(phase)
    times = 1
    if phase == "saving":
        times = rng.randint(1, max(1, (STEPS - _last_step(run.folder)) // SAVE_STEPS))
    elif phase == "store":
        times = rng.randint(1, max(1, whole.writes))
    while phase != "start" and told.entered[index] < times:
        if victim.exitcode is not None:
            return None
        time.sleep(0.0005)
    since = begun if phase == "start" else told.since[index]
    time.sleep(max(0.0, since + moment * whole.seconds[phase] - time.monotonic()))
    victim.kill()
    victim.join()
    if victim.exitcode != -9:
        return None
    return Kill(told.name(), _scoring_lost(run, told), _steps_lost(run))


def _end(processes: Sequence[tuple[Any, Told]], patience: float) -> float:
    """Waits for the processes, for no longer than that, and returns the seconds it took."""
    started = time.monotonic()
    for process, _ in processes:
        process.join(max(0.0, started + patience - time.monotonic()))
    for process, _ in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return time.monotonic() - started


def _scoring_lost(run: Run, told: Told) -> float:
    if told.name() not in ("pass", "store"):
        return 0.0
    in_pass = time.monotonic() - told.since[PHASES.index("pass")]
    written = [file.stat().st_mtime for file in run.folder.glob("cache/**/*.parquet")]
    return min([in_pass, *(time.time() - when for when in written)])


def _last_step(folder: Path) -> int:
    """Of the last checkpoint that is whole; its state is the last file that is written."""
    whole = folder.glob("checkpoint-*/trainer_state.json")
    return max((int(file.parent.name.rpartition("-")[2]) for file in whole), default=0)


def _steps_lost(run: Run) -> int:
    from soak.small import steps

    done = steps(run.steps_file)
    return max(0, done[-1]["step"] - _last_step(run.folder)) if done else 0


def _put_aside(run: Run, life: Life) -> bool:
    """Does what the message of a run that refused its last checkpoint says."""
    said = run.log_file.read_text().rpartition("Traceback")[2]
    named = re.search(r"BDPOError: .*?(checkpoint-\d+)", said, re.DOTALL)
    if not named or not (folder := run.folder / named[1]).is_dir():
        return False
    shutil.rmtree(folder)
    life.refused += 1
    return True


def _compare(life: Life, undisturbed: Run, run: Run) -> None:
    """What must hold in the end, or a fault for each that does not."""
    from soak import small

    def check(name: str, measure: Callable[[], float]) -> None:
        try:
            found = life.differences[name] = measure()
            if not found <= TOLERANCE[name]:
                life.faults.append(f"{name} differ by {found:.2g}")
        except (OSError, ValueError, KeyError) as error:
            life.faults.append(f"{name}: {error}")

    def scores() -> float:
        return small.largest_difference(small.scores(run.folder), small.scores(undisturbed.folder))

    def losses() -> float:
        expected = {entry["step"]: entry for entry in small.steps(undisturbed.steps_file)}
        # started again after its last step, a run of the hosts' own trainers makes one more
        found = [entry for entry in small.steps(run.steps_file) if entry["step"] <= STEPS]
        if missing := expected.keys() - {entry["step"] for entry in found}:
            raise ValueError(f"steps {sorted(missing)} were never run")
        return max(abs(e["loss"] - expected[e["step"]]["loss"]) for e in found)

    def weights() -> float:
        last = f"checkpoint-{STEPS}"
        both = (small.weights(r.folder / last) for r in (run, undisturbed))
        return small.largest_difference(*both)

    check("scores", scores)
    check("losses", losses)
    check("weights", weights)
    try:
        if twice := small.stored_twice(run.folder / "cache"):
            life.faults.append(f"{twice} scores are stored twice")
    except OSError as error:
        life.faults.append(f"the store: {error}")
    for left in run.folder.rglob("*.tmp"):
        life.faults.append(f"{left.name} is left in {left.parent.name}")


def kinds(folder: Path, pause: float) -> Iterator[tuple[str, Run]]:
    """The undisturbed run of each kind that can run in this environment."""
    options = {
        "pairs": PAIRS,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "bdpo_score_tokens": 512,
    }
    folder.mkdir(parents=True, exist_ok=True)
    yield "TRL, LoRA", Run(folder / "lora", options, pause=pause)
    yield "TRL, full", Run(folder / "full", options | {"adapter": "none"}, pause=pause)
    two = options | {"per_device_train_batch_size": 2}
    yield "one of two ranks", Run(folder / "two", two, pause=2 * pause, ranks=2)
    if importlib.util.find_spec("axolotl"):
        run = Run(folder / "axolotl", config=folder / "axolotl.yml", pause=pause)
        write_axolotl(run, folder, auto_resume_from_checkpoints=True)
        yield "axolotl train, full", run


def write_axolotl(run: Run, folder: Path, **keys: Any) -> None:
    """Make a model, data and the configuration of a full fine-tune that names them."""
    from bdpo_plugin.demo.tiny import build_tokenizer, preference_pairs
    from soak.small import tiny_model

    tokenizer = build_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in preference_pairs(PAIRS)))
    run.config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(folder / "model"),
                "rl": "bdpo",
                "plugins": ["bdpo_plugin.BDPOPlugin"],
                "datasets": [
                    {"path": str(data), "ds_type": "json", "type": "chat_template.default"}
                    | {"split": "train"}
                ],
                "output_dir": str(run.folder),
                "dataset_prepared_path": f"{run.folder}.prepared",
                "bdpo_cache_dir": str(run.folder / "cache"),
                "bdpo_score_tokens": 512,
                "sequence_len": 256,
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "max_steps": STEPS,
                "save_steps": SAVE_STEPS,
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-5,
                "optimizer": "adamw_torch",
                "lr_scheduler": "linear",
                "logging_steps": 1,
                "seed": 0,
                **dict.fromkeys(("bf16", "fp16", "tf32", "dataloader_pin_memory"), False),
                "dataset_num_proc": 1,
                "dataloader_num_workers": 0,
                **keys,
            }
        )
    )


def plan(count: int, available: Sequence[str], rng: random.Random) -> list[tuple[str, list[str]]]:
    """The kills as lives of one to three, each with its kind and phases."""
    lives = []
    shares = {kind: share for kind, share in KINDS.items() if kind in available}
    shares["TRL, LoRA"] += sum(KINDS.values()) - sum(shares.values())
    for kind, share in shares.items():
        of_kind = round(count * share / sum(shares.values()))
        wanted = [phase for phase, n in SHARES.items() for _ in range(n)]
        if "ranks" in kind:  # before they have met, it is torchrun that ends the others
            wanted = ["training" if phase == "start" else phase for phase in wanted]
        phases = [wanted[i * 7 % len(wanted)] for i in range(of_kind)]  # 7 and 20: all in turn
        rng.shuffle(phases)
        while phases:
            size = rng.randint(1, 3)
            lives.append((kind, phases[:size]))
            phases = phases[size:]
    return lives


def show(lives: Sequence[Life]) -> list[Table]:
    """The tables: by phase, and by kind of run."""
    by_phase = Table(title="Kills by phase", title_justify="left")
    for column in (
        "phase",
        "kills",
        "of runs that ended as undisturbed",
        "scoring lost, median [s]",
        "largest [s]",
        "steps run again, mean",
    ):
        by_phase.add_column(column)
    for phase in PHASES:
        kills = [(kill, life) for life in lives for kill in life.kills if kill.phase == phase]
        if not kills:
            continue
        lost = [kill.scoring_lost for kill, _ in kills]
        by_phase.add_row(
            phase,
            str(len(kills)),
            str(sum(not life.faults for _, life in kills)),
            f"{statistics.median(lost):.1f}",
            f"{max(lost):.1f}",
            f"{statistics.mean(kill.steps_lost for kill, _ in kills):.1f}",
        )
    by_kind = Table(title="Runs by kind", title_justify="left")
    names = ("kind", "runs", "kills", "checkpoints refused", "identical", "with faults")
    for column in (*names, *(f"{name}, largest difference" for name in TOLERANCE)):
        by_kind.add_column(column)
    for kind in dict.fromkeys(life.kind for life in lives):
        of_kind = [life for life in lives if life.kind == kind]
        by_kind.add_row(
            kind,
            str(len(of_kind)),
            str(sum(len(life.kills) for life in of_kind)),
            str(sum(life.refused for life in of_kind)),
            str(sum(not life.faults and not any(life.differences.values()) for life in of_kind)),
            str(sum(bool(life.faults) for life in of_kind)),
            *(f"{max(x.differences.get(n, 0) for x in of_kind):.1g}" for n in TOLERANCE),
        )
    return [by_phase, by_kind]


@click.command()
@click.option("--kills", "count", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--pause", default=0.06, show_default=True, help="Seconds more a scoring batch.")
@click.option("--at-once", default=1, show_default=True, help="Runs at the same time.")
@click.option("--minutes", default=30.0, show_default=True, help="Start no further run then.")
@click.option("--kind", "only", multiple=True, type=click.Choice(list(KINDS)))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Goes on there.")
def main(count, seed, pause, at_once, minutes, only, work) -> None:
    """Kill runs at random moments, start them again, and compare with undisturbed ones.

    What came of each run is kept in WORK/lives.jsonl: the same command goes on from there, and
    another seed adds to it.
    """
    started, console = time.monotonic(), Console(width=160)
    folder = (work or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "lives.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    runs = dict(kinds(folder / f"undisturbed-{uuid.uuid4().hex[:4]}", pause))
    lives = list(enumerate(plan(count, list(runs), random.Random(seed))))
    todo = [(n, *life) for n, life in lives if life[0] in (only or runs)]
    todo = [life for life in todo if f"{seed}-{life[0]}" not in {entry["life"] for entry in done}]
    axolotl = ["axolotl.cli.main", "axolotl.cli.train", "axolotl.core.builders", "evaluate"]
    warm = Warm(*(axolotl if any("axolotl" in kind for _, kind, _ in todo) else []))
    with ThreadPoolExecutor(at_once) as pool:
        wanted = sorted({kind for _, kind, _ in todo})
        first = pool.map(lambda kind: Undisturbed(warm, runs[kind]), wanted)
        whole = dict(zip(wanted, first, strict=True))

        def one(number: int, kind: str, phases: list[str]) -> Life | None:
            if time.monotonic() - started > 60 * minutes:
                return None
            rng, place = random.Random(f"{seed} {number}"), folder / f"life-{seed}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            life = live(warm, whole[kind], kind, place / "run", phases, rng)
            if not life.faults:
                shutil.rmtree(place)
            return life

        for (number, *_), life in zip(todo, pool.map(lambda x: one(*x), todo), strict=True):
            if life is None:
                console.print(f"[bold red]{minutes:g} minutes are over: the same command goes on")
                break
            done.append({"life": f"{seed}-{number}", **asdict(life)})
            with kept.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            where = ", ".join(kill.phase for kill in life.kills) or "not killed"
            console.print(f"{life.kind}: {where}: {'; '.join(life.faults) or 'as undisturbed'}")
    finished = [Life(**{k: v for k, v in entry.items() if k != "life"}) for entry in done]
    for life in finished:
        life.kills = [kill if isinstance(kill, Kill) else Kill(**kill) for kill in life.kills]
    for table in show(finished):
        console.print(table)
    stopped = [kill.others_after for x in finished for kill in x.kills if "ranks" in x.kind]
    if stopped:
        console.print(f"The other rank had stopped {max(stopped):.1f} s later at most.")
    if faults := sum(bool(life.faults) for life in finished):
        raise SystemExit(f"{faults} runs with faults: their folders are in {folder}")


if __name__ == "__main__":
    main()
