"""``python -m studies.real_models``: train, evaluate, and write the tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bdpo_plugin.settings import BDPOError
from studies.real_models import refusal
from studies.real_models.runs import METHODS, OURS, Run, Setting, StepError, prepare

PROMPTS = Path(__file__).parent / "prompts"


def _list(_: click.Context, option: click.Parameter, value: str) -> tuple[Any, ...]:
    """The parts of a text with commas; those of --methods and --seeds are checked."""
    parts = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    if option.name == "methods" and (not parts or set(parts) - set(METHODS)):
        raise click.BadParameter(f"{value!r}: some of {','.join(METHODS)} are wanted.")
    if option.name == "seeds":
        if not parts or not all(part.isdecimal() for part in parts):
            raise click.BadParameter(f"{value!r}: whole numbers with commas between are wanted.")
        return tuple(map(int, parts))
    return parts


def _keys(_: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    keys = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r}: KEY=VALUE is wanted.")
        if key in OURS:
            raise click.BadParameter(f"`{key}` is set by this command.")
        keys[key] = yaml.safe_load(text)
    return keys


def _prompts(_: click.Context, option: click.Parameter, files: Sequence[Path]) -> tuple[Path, ...]:
    files = tuple(files) or tuple(PROMPTS / f"{n}.txt" for n in ("harmful", "lookalike", "benign"))
    if len({file.stem for file in files}) < len(files):
        raise click.BadParameter("two files have the same name; they stand in the tables by it.")
    return tuple(file.absolute() for file in files)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"max_content_width": 100})
@click.option("--model", required=True, help="Name or folder of a model with a chat template.")
@click.option(
    "--output",
    required=True,
    type=_FOLDER,
    help="Folder for all that comes of it; the same again goes on where it was.",
)
@click.option(
    "--data",
    default="PKU-Alignment/PKU-SafeRLHF",
    show_default=True,
    help="Dataset of the hub, or a JSON or JSONL file, with that one's columns.",
)
@click.option(
    "--pairs",
    default=2000,
    show_default=True,
    type=click.IntRange(min=2),
    help="Half with one safe response, half with two. The paper has 20,000.",
)
@click.option(
    "--methods",
    default=",".join(METHODS),
    show_default=True,
    callback=_list,
    help="shuffled: B-DPO with the mutual information of another pair, the control.",
)
@click.option(
    "--seeds",
    default="0,1,2",
    show_default=True,
    callback=_list,
    help="Of the adapter, the order of the data and the shuffle, the same for each method.",
)
@click.option(
    "--adapter",
    type=click.Choice(["qlora", "lora", "full"]),
    default="qlora",
    show_default=True,
    help="The recipe of example_configs/axolotl that the runs begin from.",
)
@click.option("--beta", type=float, help="Of DPO.  [default: the recipe's]")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--learning-rate", type=float, help="[default: the recipe's]")
@click.option(
    "--set",
    "keys",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_keys,
    help="Any other key of Axolotl; bdpo_* keys go to the methods that have them.",
)
@click.option(
    "--tasks",
    default="truthfulqa_mc2,arc_easy,hellaswag",
    show_default=True,
    callback=_list,
    help="Of lm-eval, with commas between; '' for none.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with further tasks of lm-eval.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task.  [default: all]")
@click.option(
    "--prompts",
    multiple=True,
    type=_FILE,
    callback=_prompts,
    show_default="harmful, lookalike and benign, in prompts/ beside this module",
    help="Text file, one user message a line; repeatable. To files whose name begins with "
    "'harmful' a refusal is wanted, to all others an answer.",
)
@click.option(
    "--batch",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows at a time in evaluations.",
)
@click.option(
    "--tokens",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="The most of an answer.",
)
@click.option(
    "--launcher",
    type=click.Choice(["accelerate", "torchrun", "python"]),
    default="accelerate",
    show_default=True,
    help="Of axolotl train.",
)
@click.option("--dry-run", is_flag=True, help="Prepare the data, say what would be run, stop.")
def main(
    model: str,
    output: Path,
    data: str,
    pairs: int,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    keys: dict[str, Any],
    include_path: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train DPO, B-DPO and its shuffled control on a real model through Axolotl, evaluate each
    with lm-eval and with files of prompts, and write results.md with the differences.

    Each run is a process of its own, for one GPU or for all that Axolotl is told to use. What is
    finished is kept, and a run that failed is tried again by the next start.
    """
    for package, what in (("axolotl", "training"), ("lm_eval", "--tasks (or --tasks '')")):
        if not find_spec(package) and (package == "axolotl" or options["tasks"]):
            raise click.ClickException(f"{package} is not installed, and {what} needs it.")
    for name in options["prompts"]:
        refusal.read_prompts(name)
    for option, key in (("beta", "rl_beta"), ("epochs", "num_epochs"), ("learning_rate",) * 2):
        if (value := options.pop(option)) is not None:
            keys[key] = value
    output = output.absolute()
    try:
        file, counts = prepare(data, pairs, output)
    except BDPOError as error:
        raise click.ClickException(str(error)) from error
    setting = Setting(
        model=str(Path(model).absolute()) if Path(model).is_dir() else model,
        pairs=file,
        output=output,
        keys=keys,
        include=include_path.absolute() if include_path else None,
        **options,
    )
    runs = [Run(setting, "untrained")]
    runs += [Run(setting, method, seed) for seed in seeds for method in methods]
    about = _about(setting, data, counts, methods, seeds)
    screen = Console(stderr=True)
    _show(screen, about, runs)
    if not dry_run:
        _run_all(screen, setting, runs, about)


def _about(
    setting: Setting,
    data: str,
    counts: dict[str, int],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, str]:
    """What the command resolved to, for the screen and for the tables."""
    import torch

    config = Run(setting, "bdpo", 0).config(setting.output)
    shown = {"beta": "rl_beta", "epochs": "num_epochs", "learning rate": "learning_rate"}
    packages = ["bdpo-plugin", "axolotl", "trl", "transformers", "torch"]
    packages += ["lm_eval"] if setting.tasks else []
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"no GPU, {os.cpu_count()} cores"
    return {
        "model": setting.model,
        "data": f"{data}: {', '.join(f'{name} {n}' for name, n in counts.items())}",
        "methods, seeds": f"{', '.join(methods)}; {', '.join(map(str, seeds))}",
        "training": f"{setting.adapter}; "
        + ", ".join(f"{name} {config[key]}" for name, key in shown.items()),
        "B-DPO": ", ".join(
            f"{k} {v}" for k, v in config.items() if k.startswith("bdpo_") and "cache" not in k
        ),
        "set": ", ".join(f"{k}: {v}" for k, v in setting.keys.items()) or "nothing else",
        "lm-eval": (", ".join(setting.tasks) or "none")
        + (f", {setting.limit} documents each" if setting.limit else ""),
        "prompts": ", ".join(f"{f.stem} {len(refusal.read_prompts(f))}" for f in setting.prompts),
        "device": device,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _show(screen: Console, about: dict[str, str], runs: Sequence[Run]) -> None:
    table = Table(title="B-DPO on a real model", title_justify="left", show_header=False)
    for name, value in about.items():
        table.add_row(name, escape(value))
    files = [file for run in runs for file in run.files().values()]
    done = sum(file.exists() for file in files)
    table.add_row("steps", f"{len(files)}, {done} of them finished")
    screen.print(table)


def _run_all(screen: Console, setting: Setting, runs: Sequence[Run], about: dict[str, Any]) -> None:
    from studies.real_models import report

    failed: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("", total=sum(len(run.files()) for run in runs))
        for run in runs:
            for step in run.files():
                bar.update(task, description=f"{run.name}: {step} ({run.folder.name}/{step}.log)")
                try:
                    run.perform(step)
                except StepError as error:
                    failed[f"{run.name} ({step})"] = str(error)
                    screen.print(f"[red]FAILED[/] {escape(str(error))}")
                    if step == "train":  # there is nothing to evaluate
                        break
                bar.advance(task)
            tables = report.write(setting, runs, about, failed)
    screen.print(f"{tables}\n{setting.output / 'runs'}: models, logs and answers")
    if failed:
        raise click.ClickException(
            f"{len(failed)} steps failed: {', '.join(failed)}. The same command tries them again."
        )


if __name__ == "__main__":
    main()
