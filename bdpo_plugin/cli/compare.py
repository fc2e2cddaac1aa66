"""`bdpo compare`: shows how the settings and the final figures of several runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from bdpo_plugin.cli.options import EXISTING_FOLDER, JSON, cell, console
from bdpo_plugin.output.run_folder import ADAPTER, BDPO, ENDED, Run, evaluations, named, read_run
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
_NOT_SET = "(not set)"
#: Settings whose own names say too little.
_WORDS = {
    "reference": "reference model (digest)",
    "training pairs": "training pairs (digest)",
    "chat_template": "chat template (digest)",
    "null_prompt.text": "null prompt",
}
_DIGEST = re.compile("[0-9a-f]{32}")


@click.command()
@click.argument("run_dirs", nargs=-1, required=True, type=EXISTING_FOLDER)
@JSON
def compare(run_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Show in which settings the runs in RUN_DIRS differ, and their final figures.

    B-DPO's runs and others; `bdpo plot` draws the same. A setting is compared among the runs that
    record it; a plain DPO run records few. A figure of the training is the mean over the last
    tenth of its steps, one of an evaluation set that of its last evaluation.
    """
    runs = [read_run(directory, name) for directory, name in named(run_dirs)]
    different = differing(runs)
    figures = [final_figures(run) for run in runs]
    notes = list(_notes(runs))
    if as_json:
        of_runs = {run.name: found for run, found in zip(runs, figures, strict=True)}
        said = {"settings": different, "figures": of_runs, "notes": notes}
        click.echo(json.dumps(said, indent=1))
        return

    from rich.table import Table

    screen = console(max(100, 32 + 24 * len(runs)))

    def show(title: str, rows: Mapping[str, Sequence[Any]]) -> None:
        table = Table("", title=cell(title), title_justify="left")
        for run in runs:
            table.add_column(cell(run.name), overflow="fold")
        for name, values in rows.items():
            table.add_row(cell(name), *(cell(_shown(value)) for value in values))
        screen.print(table)

    if different:
        show("Settings that differ", {_WORDS.get(k, k): of for k, of in different.items()})
    elif len(runs) > 1:
        click.echo("No setting that these runs record differs.")
    for part in dict.fromkeys(part for of in figures for part in of):
        found = [of.get(part, {}) for of in figures]
        names = dict.fromkeys(name for of in found for name in of)
        show(part.capitalize(), {name: [of.get(name) for of in found] for name in names})
    for note in notes:
        click.echo(f"{click.style('note', fg='yellow')}: {visible(note)}")


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the settings that differ between runs: a list of values each, in the order of runs.

    Only runs with settings of the same origin are compared, such as two with a record of B-DPO, or
    two that the same host was configured for. The value of any other run is None.
    """
    rows = {
        "method": [_method(run) for run in runs],
        "adapter": [run.settings.get(ADAPTER, {}).get("peft_type", "none") for run in runs],
    }
    for origin in dict.fromkeys(origin for run in runs for origin in run.settings):
        found = [run.settings.get(origin) for run in runs]
        for name in sorted({name for of in found if of is not None for name in of}):
            rows[name] = [None if of is None else of.get(name, _NOT_SET) for of in found]

    def differ(values: list[Any]) -> bool:
        known = [value for value in values if value is not None]
        return any(value != known[0] for value in known)

    return {name: values for name, values in rows.items() if differ(values)}


def _method(run: Run) -> str:
    settings = run.settings.get(BDPO)
    if settings is None:
        return "DPO"
    if "control" in settings:
        return f"control {settings['control']}"
    if run.scores is not None and not run.measured:
        return "B-DPO with all weights 1, as DPO"
    if "weigh.name" in settings:
        return f"B-DPO, weighed by {settings['weigh.name']}"
    return f"B-DPO, alpha {settings.get('bdpo_alpha')}"


def _notes(runs: Sequence[Run]) -> list[str]:
    """Returns what must be known to compare the runs."""
    of_axolotl = [
        run.name
        for run in runs
        if ADAPTER in run.settings and run.settings.get(BDPO, {}).get("host") == "axolotl"
    ]
    plain = [run.name for run in runs if ADAPTER in run.settings and BDPO not in run.settings]
    if not of_axolotl or not plain:
        return []
    return [
        f"{', '.join(plain)}: Axolotl does not seed a new adapter in its own DPO, so such a run "
        f"begins with other weights than {', '.join(of_axolotl)}, which B-DPO seeds. To compare "
        "them, train the baseline by `rl: bdpo` with `bdpo_alpha: 0`: this is DPO, from the same "
        "weights."
    ]


def final_figures(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the final figures: of the run as a whole, of its training, and of each evaluation."""
    whole: dict[str, Any] = {"steps": max(entry["step"] for entry in run.log)}
    if rates := [entry["learning_rate"] for entry in run.log if "learning_rate" in entry]:
        whole["highest learning rate"] = max(rates)
    if run.scores is not None:
        whole["training pairs"] = run.scores.num_rows
    for name, key in _ONCE.items():
        if values := [entry[key] for entry in run.log if key in entry]:
            whole[name] = values[-1]
    found = {"the run": whole, "training": _figures(run.log, 10)}
    for name, entries in evaluations(run.log).items():
        part = f"evaluation of {name}" if name else "evaluation"
        found[part] = _figures(entries, len(entries))
    return found


def _figures(log: Sequence[Mapping[str, Any]], parts: int) -> dict[str, Any]:
    """Returns the means of the figures over the last of so many parts of a log."""
    found: dict[str, Any] = {}
    for name, key in _FIGURES.items():
        if values := [entry[key] for entry in log if key in entry]:
            last = values[-max(1, len(values) // parts) :]
            found[name] = sum(last) / len(last)
    if (chosen := found.get("reward of chosen")) is not None:
        found["both rewards fell"] = max(chosen, found["reward of rejected"]) < 0
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, list):
        return shorten(", ".join(map(_shown, value)), 160)
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:8]
    return f"{value:.4g}" if isinstance(value, float) else shorten(str(value), 160)
