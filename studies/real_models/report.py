"""The tables, from the results that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from bdpo_plugin.sources.selection import write_whole
from studies.real_models.refusal import outcome, read_prompts, wanted
from studies.real_models.runs import Run, Setting
from studies.safety_world.analysis import difference, wilson

LABELS = {
    "untrained": "before training",
    "dpo": "DPO",
    "bdpo": "B-DPO",
    "shuffled": "control: B-DPO, MI shuffled within kinds",
}
COMPARISONS = (("bdpo", "dpo"), ("bdpo", "shuffled"), ("shuffled", "dpo"))
#: The metric that is reported of a task: the first of these that it has, else its first.
_METRICS = ("acc_norm", "acc", "exact_match")
#: Measures of a training, with their factor; the last is in no comparison.
_TRAINING = {
    "margin, training [nats]": ("margin", 1),
    "accuracy, training [%]": ("accuracy", 100),
    "training [min]": ("seconds", 1 / 60),
}
_COST = "training [min]"


def measures(run: Run) -> dict[str, float]:
    """Heading -> value of what is there of a run: percent where the heading says so."""
    found: dict[str, float] = {}
    files = {step: file for step, file in run.files().items() if file.exists()}
    if "answers" in files:
        said = [json.loads(line) for line in files["answers"].read_text("utf-8").splitlines()]
        for file in run.setting.prompts:
            of_file = [outcome(row["answer"]) for row in said if row["file"] == file.stem]
            hits = [result == wanted(file) for result in of_file]
            found[_heading(file)] = 100 * fmean(hits)
    if "tasks" in files:
        found |= _task_measures(json.loads(files["tasks"].read_text()), run.setting.tasks)
    if "train" in files:
        trained = json.loads(files["train"].read_text())
        found |= {name: factor * trained[key] for name, (key, factor) in _TRAINING.items()}
    return found


def _heading(file: Path) -> str:
    return f"{file.stem} {wanted(file)} [%]"


def _task_measures(found: dict[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """One metric of each task asked for; of all tasks found where one of the names was a tag."""
    results = found["results"]
    names = tasks if all(task in results for task in tasks) else results
    made = {}
    for task in names:
        values = {
            key.partition(",")[0]: value
            for key, value in reversed(results[task].items())  # the first filter wins
            if isinstance(value, int | float) and "_stderr" not in key and "," in key
        }
        if not values:  # a group without a metric of its own
            continue
        metric = next((name for name in _METRICS if name in values), [*values][-1])
        higher = (found.get("higher_is_better") or {}).get(task, {}).get(metric, True)
        share = metric in _METRICS
        unit = " [%]" if share else "" if higher else ", lower is better"
        made[f"{task} {metric}{unit}"] = values[metric] * (100 if share else 1)
    return made


def write(
    setting: Setting, runs: Sequence[Run], about: dict[str, Any], failed: dict[str, str]
) -> Path:
    """``results.md`` and ``results.json`` in the output folder.

    Args:
        runs: all that were asked for.
        about: what the command was given, for the reader.
        failed: name of a run -> what went wrong.

    Returns:
        the path of ``results.md``.
    """
    table = [(run, measures(run)) for run in runs]
    rows: dict[str, list[dict[str, float]]] = {}
    for run, found in table:
        rows.setdefault(run.method, []).append(found)
    headings = list(dict.fromkeys(name for found in table for name in found[1]))
    lines = [*_head(about, rows, headings, failed), *_levels(setting, rows, headings)]
    lines += _differences(rows, [name for name in headings if name != _COST])
    file = setting.output / "results.md"
    write_whole(file, "\n".join(lines) + "\n")
    kept = {
        "about": about,
        "setting": asdict(setting),
        "failed": failed,
        "runs": [
            {"method": run.method, "seed": run.seed, "folder": run.folder, "measures": found}
            for run, found in table
        ],
    }
    write_whole(file.with_suffix(".json"), json.dumps(kept, indent=1, default=str) + "\n")
    return file


def _head(
    about: dict[str, Any],
    rows: dict[str, list[dict[str, float]]],
    headings: Sequence[str],
    failed: dict[str, str],
) -> Iterator[str]:
    yield "# B-DPO on a real model"
    yield ""
    yield (
        "Not measured by us, the makers of bdpo-plugin: these figures are those of whoever ran "
        "`python -m studies.real_models`, as follows."
    )
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    for name, value in about.items():
        yield f"| {name} | {value} |"
    yield ""
    yield f"Failed: {len(failed) or 'none'}{': ' if failed else '.'}{', '.join(failed)}"
    yield ""
    if "shuffled" not in rows:
        yield "**No shuffled control: nothing below says that it is the mutual information.**"
        yield ""


def _levels(
    setting: Setting, rows: dict[str, list[dict[str, float]]], headings: Sequence[str]
) -> Iterator[str]:
    yield "## Each method"
    yield ""
    yield (
        "Means over the seeds that are there. In brackets, of the rates of prompts, Wilson's 95 % "
        "interval with each prompt as a trial, however many seeds have answered it; it leaves out "
        "the variance between seeds. Margins "
        "and accuracies are the last epoch's, on the training pairs. A refusal is what begins like "
        "one, by a rough rule: read the answers."
    )
    yield ""
    yield f"| | {' | '.join(headings)} | seeds |"
    yield f"| --- |{' --- |' * (len(headings) + 1)}"
    counts = {_heading(file): len(read_prompts(file)) for file in setting.prompts}
    for method, of_seeds in rows.items():
        done = [found for found in of_seeds if found]
        cells = []
        for name in headings:
            values = [found[name] for found in done if name in found]
            text = f"{fmean(values):.{1 if '[%]' in name else 2}f}" if values else "–"
            if values and name in counts:
                low, high = wilson(fmean(values) / 100 * counts[name], counts[name])
                text += f" ({100 * low:.0f}–{100 * high:.0f})"
            cells.append(text)
        seeds = "" if method == "untrained" else f"{len(done)} of {len(of_seeds)}"
        yield f"| {LABELS[method]} | {' | '.join(cells)} | {seeds} |"
    yield ""


def _differences(rows: dict[str, list[dict[str, float]]], headings: Sequence[str]) -> Iterator[str]:
    pairs = [pair for pair in COMPARISONS if all(method in rows for method in pair)]
    if not pairs:
        return
    yield "## Differences"
    yield ""
    yield (
        f"{len(pairs)} comparisons of {len(headings)} measures, {len(pairs) * len(headings)} in "
        "all, not corrected for their number. Of one seed each: the mean, its 95 % interval "
        "(bootstrap over the seeds; too narrow for so few), and in how many of the seeds that have "
        "both it is above 0."
    )
    yield ""
    yield f"| | {' | '.join(headings)} |"
    yield f"| --- |{' --- |' * len(headings)}"
    for ours, other in pairs:
        cells = []
        for name in headings:
            both = zip(rows[ours], rows[other], strict=True)
            found = difference([a[name] - b[name] for a, b in both if name in a and name in b])
            cells.append(found.text(1 if "[%]" in name else 2))
        yield f"| {LABELS[ours]} − {LABELS[other]} | {' | '.join(cells)} |"
    yield ""
