"""``python -m benchmarks.scaling``: how cost grows with pairs, length, vocabulary and batch."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from benchmarks.runs import Runs, console, describe, json_option, make_runs, progress, save
from benchmarks.setting import Setting, setting_options, take_setting

SWEEPS = (
    "pairs=16,32,64,128",
    "response=50,100,200,400",
    "vocabulary=8000,16000,32000,64000,128000",
    "batch=1,2,4,8",
)
MEASURES = {
    "pass_s": "pass [s]",
    "train_s": "training [s]",
    "peak_over_load_mib": "peak memory beyond what is loaded [MiB]",
}
RATIOS = {"wall_s": "wall time", "cpu_s": "processor time", "peak_mib": "peak memory"}


class _Sweep(click.ParamType):
    """``option=value,value,...`` of a numeric option of the setting."""

    name = "OPTION=VALUE,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, list[Any]]:
        if isinstance(value, tuple):
            return value
        option, _, values = value.partition("=")
        kinds = {f.name: type(f.default) for f in fields(Setting)}
        try:
            if not issubclass(kind := kinds[option], int | float):
                raise ValueError
            return option, [kind(v) for v in values.split(",")]
        except (KeyError, ValueError):
            self.fail(f"{value!r}: write a numeric option and its values, like {SWEEPS[0]}")


@click.command()
@click.option(
    "--sweep",
    "sweeps",
    type=_Sweep(),
    multiple=True,
    default=SWEEPS,
    show_default=True,
    help="An option and the values to run it at.",
)
@click.option("--no-host", is_flag=True, help="B-DPO alone.")
@click.option(
    "--within",
    type=float,
    help="MiB of peak memory at which a sweep ends: the largest value within it is told.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves into a PNG."
)
@json_option
@setting_options
def main(
    sweeps: tuple[tuple[str, list[Any]], ...],
    no_host: bool,
    within: float | None,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """One epoch of B-DPO and of the host's DPO at several values of an option, the others as given.

    Best with responses of one length (--sigma 0) and --adapter lora: the memory of a full
    fine-tune's gradients and optimizer grows with the vocabulary whatever the step does.
    """
    setting = take_setting(options)
    methods = ["bdpo"] if no_host else ["dpo", "bdpo"]
    curves: dict[str, dict[str, Any]] = {}
    with progress(len(methods) * sum(len(values) for _, values in sweeps)) as show:
        for option, values in sweeps:
            results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
            for value in values:
                with make_runs(_at(setting, option, value)) as runs:
                    for method in methods:
                        show(f"{option} {value}, {method}")
                        if within is None or _fits(results[method], within):
                            results[method] += _run(runs, method, within)
            curves[option] = {"values": values, "results": results}
    screen = console()
    for option, curve in curves.items():
        screen.print(table(option, curve))
        if within is not None:
            screen.print(_largest(option, curve, within))
    screen.print(describe(setting, runs.machine), highlight=False)
    if plot:
        _draw(curves, plot)
    save(json_file, setting=asdict(setting), machine=runs.machine, curves=curves)


def _at(setting: Setting, option: str, value: Any) -> Setting:
    changed = replace(setting, **{option: value})
    return replace(
        changed,
        longest=max(changed.longest, math.ceil(changed.response)),
        pairs=max(changed.pairs, changed.batch),
    )


def _run(runs: Runs, method: str, within: float | None) -> list[dict[str, Any]]:
    """The run; one with infinite memory where it does not fit into a GPU whose limit is sought."""
    try:
        return [runs.run(method)]
    except click.ClickException as error:
        if within is None or "OutOfMemoryError" not in error.message:
            raise
        return [dict.fromkeys([*MEASURES, *RATIOS], math.inf)]


def _fits(results: list[dict[str, Any]], within: float) -> bool:
    return not results or results[-1]["peak_mib"] <= within


def _largest(option: str, curve: dict[str, Any], within: float) -> str:
    """Of each method the largest value of the option that fits."""
    told = []
    for method, results in curve["results"].items():
        fitting = [
            value
            for value, result in zip(curve["values"], results, strict=False)
            if _fits([result], within)
        ]
        told.append(f"{method} {max(fitting):g}" if fitting else f"{method} none of them")
    return f"Largest {option} within {within:g} MiB: {', '.join(told)}"


def table(option: str, curve: dict[str, Any]) -> Table:
    """The numbers, and the exponent p of cost ~ option^p that fits them best: 1 is linear."""
    shown = Table(title=f"Against {option}", title_justify="left")
    shown.add_column("")
    for value in curve["values"]:
        shown.add_column(f"{value:g}", justify="right")
    shown.add_column("exponent", justify="right", style="bold")
    for method, results in curve["results"].items():
        for key, name in MEASURES.items():
            costs = [result[key] for result in results if math.isfinite(result[key])]
            if not all(costs):
                continue
            fit = ""
            if len(costs) > 1:
                columns = (curve["values"][: len(costs)], costs)
                logs = [[math.log(x) for x in column] for column in columns]
                fit = f"{statistics.linear_regression(*logs).slope:.2f}"
            cells = [f"{cost:.3g}" for cost in costs]
            cells += [""] * (len(curve["values"]) - len(costs))
            shown.add_row(escape(f"{method}: {name}"), *cells, fit)
    if {"dpo", "bdpo"} <= set(curve["results"]):
        pairs = list(zip(*(curve["results"][method] for method in ("bdpo", "dpo")), strict=False))
        for key, name in RATIOS.items():
            shown.add_row(
                f"bdpo / dpo: {name}", *(f"{ours[key] / theirs[key]:.2f}" for ours, theirs in pairs)
            )
    return shown


def _draw(curves: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(curves), figsize=(3.4 * len(curves), 5.6), squeeze=False, layout="constrained"
    )
    for column, (option, curve) in enumerate(curves.items()):
        for method, results in curve["results"].items():
            times = [result["pass_s"] + result["train_s"] for result in results]
            memory = [result["peak_over_load_mib"] for result in results]
            for row, costs in enumerate((times, memory)):
                axes[row, column].plot(curve["values"], costs, "o-", label=method)
        for axis, unit in zip(
            axes[:, column], ("pass + training [s]", "memory [MiB]"), strict=True
        ):
            axis.set(xlabel=option, ylim=(0, None), xlim=(0, None))
            axis.locator_params(axis="x", nbins=4)
            if not column:
                axis.set_ylabel(unit)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
