"""``python -m studies.real_models.study``: the runs of a preset, then its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bdpo_plugin.sources.selection import write_whole
from studies.pool import finished
from studies.real_models.study.design import PRESETS, Job, grid
from studies.real_models.study.worker import perform

RESULTS = Path(__file__).parent / "results"
#: Runs of a process before a new one takes its place: its memory grows by 0.3 to 0.6 GB with each.
_RUNS = 6
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"max_content_width": 100})
@click.option("--preset", type=click.Choice([*PRESETS]), required=True)
@click.option("--model", type=_FOLDER, required=True, help="The folder model/ of `bdpo real DIR`.")
@click.option(
    "--data",
    type=_FOLDER,
    required=True,
    help="With xstest/, hh-rlhf/, strongreject/ and llamafactory/: see material.py.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="results/ beside this module",
    help="Records of the runs, one file each; those that are there are not run again.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("real-study"),
    show_default=True,
    help="Where the reference's scores are kept.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--tune", is_flag=True, help="Plain DPO in the settings of the grid, other seeds.")
@click.option("--most", type=click.IntRange(min=1), help="Stop after so many runs.")
def main(
    preset: str,
    model: Path,
    data: Path,
    results: Path,
    work: Path,
    workers: int,
    tune: bool,
    most: int | None,
) -> None:
    """Train DPO, B-DPO and its controls on SmolLM2-135M and ask each what it prefers and says.

    By the plan in PLAN.md. What is finished stays; a run that failed is tried by the next start.
    """
    folder = results / ("tuning" if tune else preset)
    folder.mkdir(parents=True, exist_ok=True)
    presets = [*grid(PRESETS[preset])] if tune else [PRESETS[preset]]
    jobs = [job for setting in presets for job in setting.jobs() if not (tune and not job.seed)]
    there = [job for job in jobs if (folder / f"{job.name}.json").exists()]
    todo = [job for job in jobs if job not in there][:most]
    screen = Console(stderr=True)
    screen.print(f"{preset}: {len(jobs)} runs, {len(there)} of them finished; {len(todo)} now")
    where = (model.absolute(), data.absolute(), work.absolute())
    from studies.real_models.study import report
    from studies.real_models.study.analysis import read_all

    failed = _run(screen, todo, where, folder, workers)
    if tune:
        untrained = [
            record for record in read_all(results / preset) if record["arm"] == "untrained"
        ]
        click.echo(report.write_tuning(folder, *(untrained or [None])))
    else:
        click.echo(report.write(folder, PRESETS[preset], preset))
    if failed:
        raise click.ClickException(f"{len(failed)} failed: {', '.join(failed)}")


def _run(
    screen: Console, jobs: Sequence[Job], where: tuple[Path, Path, Path], folder: Path, workers: int
) -> list[str]:
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=screen) as bar:
        task = bar.add_task("runs", total=len(jobs))
        calls = ((job, where) for job in jobs)
        ended = finished(perform, calls, processes=workers, lifetime=_RUNS * workers)
        for (job, _), future in ended:
            lost = future.exception()
            record, error = ({}, repr(lost)) if lost else future.result()
            if error:
                failed.append(job.name)
                screen.print(f"[red]FAILED[/] {job.name}\n{escape(error)}")
            else:
                text = json.dumps(record, ensure_ascii=False) + "\n"
                write_whole(folder / f"{job.name}.json", text)
            bar.advance(task)
    return failed


if __name__ == "__main__":
    main()
