"""``python -m studies.safety_world``: run what is missing, then write tables and figures."""

from __future__ import annotations

import os

# Before torch: one thread in each process, asleep while it waits; nothing from the network.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import time
from pathlib import Path

import click
from rich.console import Console

HERE = Path(__file__).parent


@click.command()
@click.option("--quick", is_flag=True, help="One tuning seed, every experiment at reduced size.")
@click.option("--confirm", is_flag=True, help="All of it on the confirmation seeds, 10 to 19.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE / "work",
    show_default="work/ beside this module",
    help="Pretrained models, scores, finished runs: what is there is not run again.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    show_default="results/ beside this module, or results-confirmation/; with --quick results/ in "
    "the work folder",
    help="Where tables and figures go.",
)
@click.option("--tune", is_flag=True, help="DPO's grid on the tuning seeds instead, as a table.")
@click.option("--processes", default=2, show_default=True, help="Each runs on one core.")
@click.option("--dry-run", is_flag=True, help="Say how many runs there are, and run none.")
@click.option(
    "--from-records", is_flag=True, help="Run nothing: tables and figures from the records alone."
)
def main(
    quick: bool,
    confirm: bool,
    work: Path,
    results: Path | None,
    tune: bool,
    processes: int,
    dry_run: bool,
    from_records: bool,
) -> None:
    """The evidence of PLAN.md: what B-DPO does in a synthetic world, beside its controls."""
    from studies.safety_world import experiments, records, report, runner

    if quick + confirm + tune > 1:
        raise click.UsageError("--quick, --confirm and --tune exclude each other.")
    if tune:
        size = experiments.TUNING
        tables = [experiments.pretrained(size), experiments.tuning()]
    else:
        size = experiments.FULL
        if quick or confirm:
            size = experiments.QUICK if quick else experiments.CONFIRMATION
        tables = experiments.experiments(size)
    name = "results-confirmation" if confirm else "results"
    folder = results or (work if quick else HERE) / name
    if from_records:
        if tune or not (folder / records.NAME).exists():
            raise click.ClickException(
                f"{folder} has no {records.NAME}: a whole run of this command writes it."
            )
        report.write(size, tables, folder)
        click.echo(f"{folder}: tables and figures")
        return
    stages = experiments.stages(size, tables)
    screen = Console(stderr=True)
    for number, jobs in enumerate(stages, 1):
        finished = sum(job.file(work).exists() for job in jobs)
        screen.print(f"stage {number}: {len(jobs)} jobs, {finished} of them finished")
    if dry_run:
        return
    began = time.monotonic()
    failed = runner.run_all(stages, work, processes=processes)
    if tune:
        click.echo(report.tables(size, tables, work))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        records.write_records(stages, work, failed, folder / records.NAME)
        report.write(size, tables, folder)
        screen.print(f"{folder}: tables and figures")
    screen.print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        raise click.ClickException(f"{len(failed)} jobs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
