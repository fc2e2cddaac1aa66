"""``python -m studies.real_models``: the runs of a study, then its tables and figures."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bdpo_plugin.atomic import written_whole
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import read_pairs, read_text
from bdpo_plugin.sources.selection import digest
from studies.pool import finished
from studies.real_models.design import ARMS, PRESETS, Job, Preset, Sizes, Training, Where, grid
from studies.real_models.worker import perform

RESULTS = Path(__file__).parent / "results"
#: Runs of a process before a new one takes its place: its memory grows by 0.3 to 0.6 GB with each.
_RUNS = 6
_FOLDER = click.Path(file_okay=False, path_type=Path)


class Several(click.ParamType):
    """Values with commas between them."""

    def __init__(self, of: type[int | float | str]) -> None:
        self.of, self.name = of, f"{of.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return tuple(self.of(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r}: {self.of.__name__} values with commas between.", param, ctx)


def _arms(_: click.Context, option: click.Parameter, names: Sequence[str]) -> tuple[str, ...]:
    arms = tuple(name.replace(":", "-") for name in names)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(ARMS)}.")
    return arms


@click.command(context_settings={"max_content_width": 100})
@click.option("--preset", type=click.Choice([*PRESETS]), help="A study by a plan; else see --data.")
@click.option("--model", help="A folder, or a name on the hub; of a preset `bdpo real DIR`'s.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="A file of pairs, as `bdpo data` writes it; with --preset the folder of its sources.",
)
@click.option(
    "--evaluations",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with xstest/ and strongreject/, for the AUC, the choice, and the paper's prompts.",
)
@click.option("--arms", type=Several(str), default="dpo,bdpo,shuffled-label", callback=_arms)
@click.option("--seeds", type=Several(int), default="0,1,2", show_default=True)
@click.option("--epochs", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--after", type=Several(int), help="Epochs that are measured.  [default: all]")
@click.option("--pairs", default=96, show_default=True, help="Of each seed, to train on.")
@click.option("--held-out", default=400, show_default=True, help="Pairs that no arm trains on.")
@click.option("--beta", default=0.1, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--sft", default=0.2, show_default=True, help="Weight of a supervised term.")
@click.option("--rank", default=16, show_default=True, help="Of LoRA, on all linear layers.")
@click.option("--batch", default=8, show_default=True, help="Pairs of an optimizer step.")
@click.option("--tokens", default=256, show_default=True, help="The most of an answer.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the frozen weights.")
@click.option("--alphas", type=Several(float), default="", help="B-DPO at these too (Figure 5).")
@click.option("--prompts", default=40, show_default=True, help="Answered of each set; 0: none.")
@click.option("--tasks", type=Several(str), default="", help="Of lm-eval, such as gsm8k.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with further tasks of lm-eval.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task.")
@click.option("--results", type=_FOLDER, help="Records, tables, figures.  [default: real-models]")
@click.option("--work", type=_FOLDER, default=Path("real-study"), help="The reference's scores.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--tune", is_flag=True, help="Of a preset: plain DPO in the settings of the grid.")
@click.option("--most", type=click.IntRange(min=0), help="Stop after so many runs; 0: tables only.")
def main(
    preset: str | None,
    model: str | None,
    data: Path | None,
    evaluations: Path | None,
    results: Path | None,
    work: Path,
    workers: int,
    include_path: Path | None,
    tune: bool,
    most: int | None,
    **options: Any,
) -> None:
    """Train DPO, B-DPO and controls on a model, ask each what it prefers and says, and write tables
    and figures.

    What is finished stays; a run that failed is tried by the next start.
    """
    if most != 0 and (model is None or data is None):
        raise click.UsageError("--model and --data are wanted, or --most 0 for the tables alone.")
    if tune and not preset:
        raise click.UsageError("--tune is of a --preset.")
    if not preset and data is None:
        raise click.UsageError("--data or --preset is wanted.")
    try:
        setting = PRESETS[preset] if preset else _setting(model, data, evaluations, **options)
    except BDPOError as error:
        raise click.ClickException(str(error)) from error
    results = results or (RESULTS if preset else Path("real-models"))
    name = "tuning" if tune else preset or "B-DPO on a model"
    folder = results / name if preset else results
    folder.mkdir(parents=True, exist_ok=True)
    presets = [*grid(setting)] if tune else [setting]
    jobs = [job for one in presets for job in one.jobs() if not (tune and job.arm == "untrained")]
    done = [job for job in jobs if (folder / f"{job.name}.json.gz").exists()]
    todo = [job for job in jobs if job not in done][:most]
    screen = Console(stderr=True)
    screen.print(f"{name}: {len(jobs)} runs, {len(done)} of them finished; {len(todo)} now")
    failed = []
    if todo:
        sources = Path(str(data)).absolute()
        where = Where(_absolute(model), sources, evaluations, work.absolute(), include_path)
        failed = _run(screen, todo, where, folder, workers)
    from studies.real_models import report
    from studies.real_models.analysis import read_all

    if tune:
        before = [run for run in read_all(results / str(preset)) if run["arm"] == "untrained"]
        click.echo(report.write_tuning(folder, *(before or [None])))
    else:
        click.echo(report.write(folder, setting, name))
    if failed:
        raise click.ClickException(f"{len(failed)} failed: {', '.join(failed)}")


def _setting(
    model: str | None,
    data: Path | None,
    evaluations: Path | None,
    *,
    seeds: tuple[int, ...],
    arms: tuple[str, ...],
    epochs: int,
    after: tuple[int, ...] | None,
    pairs: int,
    held_out: int,
    dtype: str | None,
    prompts: int,
    alphas: tuple[float, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    **training: Any,
) -> Preset:
    """The preset that the options of a file of pairs name."""
    import torch

    after = after or tuple(range(1, epochs + 1))
    if not set(after) <= set(range(1, epochs + 1)):
        raise click.BadParameter(f"{after}: of {epochs} epochs.", param_hint="--after")
    text = read_text(Path(str(data)))
    read_pairs(text, str(data))  # what cannot be read is said before a model is loaded
    digests = [digest(text)] + (["evaluations"] if evaluations else [])
    asked = dict.fromkeys(("harmful", "unsafe", "safe", "ordinary"), prompts)
    return Preset(
        seeds=seeds,
        arms=arms,
        dtype=dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        training=Training(xstest=0, hh=pairs, epochs=epochs, **training),
        sizes=Sizes(**asked, answer=64, hh=held_out, nll=held_out, likened=3),
        alphas=alphas,
        betas=(1,),
        after=tuple(sorted(after)),
        answered=bool(prompts or tasks),
        plan="",
        model=str(model),
        data="-".join(digests),
        tasks=tasks,
        limit=limit,
    )


def _absolute(model: str | None) -> str:
    """A folder by its whole path, a name on the hub as it is."""
    return str(Path(str(model)).absolute()) if Path(str(model)).is_dir() else str(model)


def _run(
    screen: Console, jobs: Sequence[Job], where: Where, folder: Path, workers: int
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
                with written_whole(folder / f"{job.name}.json.gz") as temporary:
                    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
            bar.advance(task)
    return failed


if __name__ == "__main__":
    main()
