"""Runs jobs in processes of their own, with a progress bar, and sums their results up."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.setting import Setting

ROOT = Path(__file__).parents[1]
#: What :meth:`Runs.run` is called with for each; the warm one has the cache of the one before.
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"method": "dpo"},
    "DPO, precomputed": {"method": "dpo", "precompute_ref_log_probs": True},
    "B-DPO": {"method": "bdpo"},
    "B-DPO, warm": {"method": "bdpo"},
}
#: What keeps the hosts from the network and from reporting.
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


class Runs:
    """The runs of one setting: what they share is made once, in a folder of its own.

    Args:
        machine: what :func:`benchmarks.worker.prepare` returned, where it was called already;
            else a new process does it.
    """

    def __init__(
        self, setting: Setting, folder: Path, machine: dict[str, Any] | None = None
    ) -> None:
        self.setting = setting
        self.folder = folder
        self.machine = machine or self._call({})

    def run(
        self,
        method: str,
        *,
        train: bool = True,
        cache: str | None = None,
        profiled: int = 0,
        seconds: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """One run in a new process; see :func:`benchmarks.worker.run`.

        Args:
            method: ``dpo``, ``bdpo`` or ``bdpo-collecting``.
            cache: the folder of B-DPO's scores; default a new one.
            profiled: steps that are run once more, under the profiler.
            seconds: after which it is stopped.
            options: further training arguments.
        """
        if method != "dpo":
            options["bdpo_cache_dir"] = cache or tempfile.mkdtemp(dir=self.folder)
        job = {"method": method, "train": train, "options": options, "profiled": profiled}
        return self._call(job, seconds)

    def parts(self, *, until_forward: bool, **options: Any) -> dict[str, list[float]]:
        """What the parts of a run of ours took; see :func:`benchmarks.worker.run_parts`."""
        options["bdpo_cache_dir"] = tempfile.mkdtemp(dir=self.folder)
        return self._call({"options": options, "until_forward": until_forward})

    def _call(self, job: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        job |= {"setting": asdict(self.setting), "folder": str(self.folder)}
        output = self.folder / "result.json"
        done = run_module(self.folder, seconds, "benchmarks.worker", json.dumps(job), str(output))
        if done.returncode:
            raise click.ClickException(
                f"The run {json.dumps(job)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
            )
        return json.loads(output.read_text())


def run_module(
    folder: Path, seconds: float | None, *command: str
) -> subprocess.CompletedProcess[str]:
    """``python -m`` in a new process, whose temporary files go into `folder`.

    Raises:
        click.ClickException: it was stopped after so many seconds.
    """
    try:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | QUIET | {"TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise click.ClickException(f"stopped after {seconds:.0f} s, when the time was up") from None


@contextmanager
def make_runs(setting: Setting) -> Iterator[Runs]:
    """:class:`Runs` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Runs(setting, Path(folder))


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A function that shows what is running now, to be called before each of `total` runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preparing", total=total)
        started = 0

        def show(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, completed=started)
            started += 1

        yield show
        bar.update(task, completed=total)


def spread(values: Sequence[float]) -> str:
    """``median (minimum to maximum)``, in three digits."""
    shown = [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in (min(values), max(values))]
    median = statistics.median(values)
    text = f"{median:.3g}" if median < 1000 else f"{median:.0f}"
    return f"{text} ({shown[0]} to {shown[1]})" if len(values) > 1 else text


def comparison(
    title: str,
    results: dict[str, list[dict[str, Any]]],
    measures: dict[str, str],
    baseline: str,
) -> Table:
    """A row for each measure (key: name with unit), a column for each method and its ratio.

    The ratios are those of runs of the same turn.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("median (min to max)")
    for method in results:
        table.add_column(method, justify="right")
    for method in results:
        if method != baseline:
            table.add_column(f"{method} / {baseline}", justify="right", style="bold")
    for key, name in measures.items():
        columns = {m: [r.get(key) for r in rows] for m, rows in results.items()}
        cells = [spread(values) for values in columns.values()]
        for method, values in columns.items():
            if method == baseline:
                continue
            pairs = zip(values, columns[baseline], strict=True)
            usable = all(columns[baseline])
            cells.append(spread([ours / theirs for ours, theirs in pairs]) if usable else "")
        table.add_row(escape(name), *cells)
    return table


def describe(setting: Setting, machine: dict[str, Any]) -> str:
    """Machine and setting in a few lines."""
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB; Python {machine['python']}, "
        f"{packages}\n" + ", ".join(f"{k} {v}" for k, v in asdict(setting).items())
    )


def console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    made = Console()
    return made if made.is_terminal else Console(width=120)


def save(path: Path | None, **content: Any) -> None:
    """Write `content` as JSON, if a path is given; whole at every moment."""
    if path:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)


def json_option(command: Any) -> Any:
    """Adds ``--json FILE``."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write every run's numbers here too.",
    )(command)
