"""``python -m benchmarks.gpu``: what the owner of one GPU would want to see, in a few minutes."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.runs import Runs, json_option, progress, run_module, save
from benchmarks.setting import PRESETS, Setting

_QWEN = PRESETS["gpu-7b"] | {"batch": 1}
#: Shapes of Qwen2 and Qwen2.5, with random weights; pairs so that a run takes some seconds.
SIZES: dict[str, dict[str, Any]] = {
    "7B": _QWEN | {"pairs": 24},
    "0.5B": _QWEN
    | {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2}
    | {"vocabulary": 151936, "tied": True, "pairs": 64},
}
#: In the place of the sizes' own, to try the command without a GPU.
_TINY = {"hidden": 128, "intermediate": 128, "layers": 2, "heads": 2, "kv_heads": 1}
_TINY |= {"vocabulary": 256, "pairs": 6, "prompt": 12, "response": 12.0, "shortest": 4}
_TINY |= {"longest": 24}
#: What each size is run by, those that the others are compared with first; see :meth:`Runs.run`.
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"method": "dpo"},
    "B-DPO": {"method": "bdpo"},
    "B-DPO, warm": {"method": "bdpo"},
    "B-DPO, alpha 0": {"method": "bdpo", "bdpo_alpha": 0},
    "DPO, precomputed": {"method": "dpo", "precompute_ref_log_probs": True},
}
_FIRST = ("DPO", "B-DPO")
#: Steps under the profiler, after a run's others.
_PROFILED = 2
#: Arguments of `python -m` for the correctness, and the share of the time that it may take.
BRANCHES = ("benchmarks.branches",)
_SHARE = 0.4
#: Seconds that a run is thought to take before one of its size has been run, and those that are
#: left at the end.
_GUESS, _LAST = 30.0, 3.0


class _Time:
    """What is left of the minutes."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60 * minutes - _LAST

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="All ends after so many.")
@click.option("--only", help=f"Of {', '.join(SIZES)}, with commas between.  [default: all]")
@click.option("--tiny", is_flag=True, help="Tiny shapes under the same names, to try it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@json_option
def main(minutes: float, only: str | None, tiny: bool, device: str, json_file: Path | None) -> None:
    """First whether each branch of attention that this machine has is right, beside padding. Then
    TRL's DPO trainer and ours on two sizes of Qwen2 with random weights, LoRA, bfloat16, one pair
    a step: time, memory, and how often a step launches a kernel and waits for the device.

    Prints two tables in Markdown. What the time had no room for, and what is not installed, is
    named below them. Ends with status 1 where a branch is wrong or not taken, or a run failed.
    """
    clock = _Time(minutes)
    import torch

    from benchmarks.worker import prepare

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("There is no GPU: --device cpu --tiny tries it out.")
    chosen = only.split(",") if only else [*SIZES]
    if unknown := set(chosen) - SIZES.keys():
        raise click.BadParameter(f"{', '.join(unknown)}: {', '.join(SIZES)} are there")
    found: dict[str, Any] = {"machine": {}, "branches": {}, "results": {}, "left_out": []}
    found["branches"] = _branches(device, clock)
    save(json_file, **found)
    with ExitStack() as stack:
        rows = _rows(chosen, {"device": device} | (_TINY if tiny else {}), found["left_out"])
        made = {}
        for name, setting in rows.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found["machine"] = prepare(setting, folder)
            made[name] = Runs(setting, folder, found["machine"])
        for _ in _speeds(made, found, clock):
            save(json_file, **found)
    save(json_file, **found)
    click.echo("\n".join(report(found)))
    runs = [run for row in found["results"].values() for run in row["of"].values()]
    wrong = found["branches"]["error"] or found["branches"]["wrong"]
    sys.exit(int(bool(wrong) or any("error" in run for run in runs)))


def _branches(device: str, clock: _Time) -> dict[str, Any]:
    """What :mod:`benchmarks.branches` found, as far as it came."""
    found: dict[str, Any] = {"rows": [], "left_out": [], "planned": 0, "wrong": 0, "error": ""}
    seconds = _SHARE * clock.left
    if seconds <= 0:
        return found | {"left_out": ["all branches: no time left"]}
    with tempfile.TemporaryDirectory() as folder, progress(1) as show:
        show("the branches of attention")
        file, late, output = Path(folder, "branches.json"), [], ""
        given = ("--device", device, "--json", str(file))
        try:
            output = run_module(Path(folder), seconds, *BRANCHES, *given).stderr.strip()[-3000:]
        except click.ClickException as error:
            late = [f"further branches: {error.message}"]
        if file.exists():
            found |= json.loads(file.read_text())
        if not late and len(found["rows"]) < max(1, found["planned"]):
            found["error"] = output or "it ended without a word"
    wrong = sum(row["verdict"] != "right" for row in found["rows"])
    return found | {"left_out": found["left_out"] + late, "wrong": wrong}


def _rows(chosen: list[str], changes: dict[str, Any], left: list[str]) -> dict[str, Setting]:
    """The settings to run, by name; what cannot be run here goes to `left`."""
    from benchmarks.branches import ATTENTION, NO_PACKAGE, is_there

    left += [f"{attention}: {NO_PACKAGE}" for attention in ATTENTION if not is_there(attention)]
    return {
        f"{size}, LoRA, {attention}": Setting(**SIZES[size] | {"attention": attention} | changes)
        for attention in filter(is_there, ATTENTION)
        for size in chosen
    }


def _speeds(made: dict[str, Runs], found: dict[str, Any], clock: _Time) -> Iterator[None]:
    """Fills in the runs, each as it ends: first those that the others are compared with."""
    order = [(name, m) for name in made for m in METHODS if m in _FIRST]
    order += [(name, m) for name in made for m in METHODS if m not in _FIRST]
    caches = {name: tempfile.mkdtemp(dir=runs.folder) for name, runs in made.items()}
    took: dict[str, float] = {}
    with progress(len(order)) as show:
        for name, method in order:
            show(f"{name}: {method}")
            runs, options = made[name], METHODS[method]
            row = {"setting": asdict(runs.setting), "of": {}}
            row = found["results"].setdefault(name, row)
            if clock.left < took.get(name, _GUESS):
                found["left_out"].append(f"{name}, {method}: no time left")
                continue
            if options["method"] == "bdpo" and "bdpo_alpha" not in options:
                options = options | {"cache": caches[name]}
            start = time.monotonic()
            try:
                run = runs.run(**options, profiled=_PROFILED, seconds=clock.left)
            except click.ClickException as error:
                if clock.left <= 0:
                    found["left_out"].append(f"{name}, {method}: {error.message}")
                    continue
                text = error.message.strip()
                run = {"error": text.splitlines()[-1], "output": text}
            took[name] = max(took.get(name, 0.0), time.monotonic() - start)
            row["of"][method] = run
            yield


def report(found: dict[str, Any]) -> Iterator[str]:
    """Both tables, in Markdown, and what is missing in them."""
    from benchmarks.branches import table

    if machine := found["machine"]:
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        yield f"{machine['gpu'] or machine['cpu']}; Python {machine['python']}, {packages}."
        yield ""
    branches = found["branches"]
    yield from table(branches["rows"], branches["left_out"])
    if branches["error"]:
        yield f"- The branches FAILED: {branches['error'].splitlines()[-1]}"
    yield ""
    yield f"{branches['wrong']} of {len(branches['rows'])} are not right."
    yield ""
    for name, row in found["results"].items():
        yield from _of_size(name, row)
    for what in found["left_out"]:
        yield f"- Left out: {what}"


def _of_size(name: str, row: dict[str, Any]) -> Iterator[str]:
    setting, runs = row["setting"], row["of"]
    heads = ("epoch [s]", "pass [s]", "step [s]", "peak [GiB]")
    heads += ("launches a step", "waits a step", "reads a step")
    heads += ("epoch / DPO", "step / DPO", "peak / DPO")
    yield f"{name}, {setting['pairs']} pairs, one a step:"
    yield ""
    yield f"| | {' | '.join(heads)} |"
    yield f"|{' --- |' * (1 + len(heads))}"
    for method, run in runs.items():
        if "error" in run:
            yield f"| {method} | FAILED{' |' * len(heads)}"
            continue
        peak, calls = run["peak_mib"] / 1024, run.get("calls", {})
        cells = [f"{x:.3g}" for x in (run["wall_s"], run["pass_s"], _step(run), peak)]
        cells += [f"{calls[x]:.4g}" if calls else "–" for x in ("launches", "waits", "reads")]
        cells += _ratios(run, runs.get("DPO"))
        yield f"| {method} | {' | '.join(cells)} |"
    yield ""
    for method, run in runs.items():
        if text := run.get("error"):
            yield f"- {name}, {method} failed: {text}"
        if text := run.get("calls_error"):
            yield f"- {name}, {method}, not profiled: {text}"


def _step(run: dict[str, Any]) -> float:
    """Without the first few, where there are more."""
    return run["warm_step_s"] or run["step_s"]


def _ratios(run: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    if not base or "error" in base:
        return ["–"] * 3
    pairs = [(x["wall_s"], _step(x), x["peak_mib"]) for x in (run, base)]
    return [f"{ours / theirs:.2f}" for ours, theirs in zip(*pairs, strict=True)]


if __name__ == "__main__":
    main()
