"""`bdpo compare`: shows how the settings and the final figures of several runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.output.run_folder import ENDED, Run, evaluations, named, read_run, read_settings
from bdpo_plugin.terminal import visible

#: Name of a figure -> key of the log. A figure of the training is the mean over the last tenth of
#: its log entries; a figure of an evaluation set is its last entry.
_FIGURES = {
    "loss": "loss",
    "reward margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "reward of chosen": "rewards/chosen",
    "reward of rejected": "rewards/rejected",
    "log-probability of chosen": "logps/chosen",
    "log-probability of rejected": "logps/rejected",
    "weight of chosen": "bdpo/weight_chosen",
    "weight of rejected": "bdpo/weight_rejected",
    "imbalance": "bdpo/imbalance",
}
_ONCE = dict(zip(("seconds", "peak memory, GiB"), ENDED, strict=True))


@click.command()
@click.argument(
    "run_dirs",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and no table.")
def compare(run_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Show in which settings the runs in RUN_DIRS differ, and their final figures.

    B-DPO's runs and others; `bdpo plot` draws the same. A figure of the training is the mean over
    the last tenth of its steps, one of the evaluation that of the last one. Several evaluation
    sets are told apart by their names.
    """
    places = named(run_dirs)
    settings = {name: read_settings(directory) for directory, name in places}
    figures = {name: final_figures(read_run(directory, name)) for directory, name in places}
    different = differing(settings)
    if as_json:
        click.echo(json.dumps({"settings": different, "figures": figures}, indent=1))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, 32 + 24 * len(places)))

    def show(title: str, rows: Mapping[str, Sequence[str]]) -> None:
        table = Table("", title=title, title_justify="left")
        for _, name in places:
            table.add_column(Text(visible(name)), overflow="fold")
        for name, cells in rows.items():
            table.add_row(Text(visible(name)), *(Text(visible(cell)) for cell in cells))
        console.print(table)

    if different:
        show("Settings that differ", {k: [_cell(v) for v in of] for k, of in different.items()})
    elif len(places) > 1:
        click.echo("No setting that a run leaves in its folder differs.")
    show(
        "Final figures",
        {
            name: [_cell(of.get(name)) for of in figures.values()]
            for name in dict.fromkeys(name for of in figures.values() for name in of)
        },
    )


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the settings that differ between runs: a list of values each, in the order of runs.

    Args:
        settings: the settings of each run, by its name. A value is None where a run has no such
            setting.
    """
    names = sorted({name for of in settings.values() for name in of})
    rows = {name: [of.get(name) for of in settings.values()] for name in names}
    return {n: values for n, values in rows.items() if any(v != values[0] for v in values)}


def final_figures(run: Run) -> dict[str, Any]:
    """Returns the final figures of a run, by name."""
    found: dict[str, Any] = {"steps": max(entry["step"] for entry in run.log)}
    if rates := [entry["learning_rate"] for entry in run.log if "learning_rate" in entry]:
        found["highest learning rate"] = max(rates)
    parts: dict[str, tuple[Sequence[Mapping[str, Any]], int]] = {"training": (run.log, 10)}
    for name, entries in evaluations(run.log).items():
        parts[f"evaluation of {name}" if name else "evaluation"] = (entries, len(entries))
    for words, (log, parts_of_log) in parts.items():
        for name, key in _FIGURES.items():
            if values := [entry[key] for entry in log if key in entry]:
                last = values[-max(1, len(values) // parts_of_log) :]
                found[f"{words}: {name}"] = sum(last) / len(last)
        if (chosen := found.get(f"{words}: reward of chosen")) is not None:
            fell = max(chosen, found[f"{words}: reward of rejected"]) < 0
            found[f"{words}: both rewards fell"] = fell
    if run.scores is not None:
        found["training pairs"] = run.scores.num_rows
    for name, key in _ONCE.items():
        if values := [entry[key] for entry in run.log if key in entry]:
            found[name] = values[-1]
    return found


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
