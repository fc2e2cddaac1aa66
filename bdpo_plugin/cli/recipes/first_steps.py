"""Runs the first steps of a recipe with its host, for `bdpo recipes check --run`."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import yaml

from bdpo_plugin.cli.doctor import hider
from bdpo_plugin.cli.no_side_effects import no_side_effects
from bdpo_plugin.cli.recipes.run import command, start
from bdpo_plugin.hosts import part
from bdpo_plugin.output.run_folder import RECORD
from bdpo_plugin.output.run_record import STEP
from bdpo_plugin.recipes.host_config import check_model
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.terminal import visible


@contextmanager
def run_first_steps(recipe: Recipe, arguments: tuple[str, ...]) -> Iterator[Path]:
    """Runs the first steps of a recipe with its host's command, and yields their output folder.

    The folder is removed when the context ends.

    Raises:
        click.ClickException: the recipe has no expected numbers, its model cannot be loaded, or the
            host ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="bdpo-recipe-") as name, no_side_effects():
        folder = Path(name)
        started, environment = prepare(recipe, folder, arguments)
        check_model(recipe.host, recipe.config)
        log = folder / "log.txt"
        steps = int(environment["BDPO_FIRST_STEPS"])
        click.echo(f"Running the first {steps} steps of {recipe.path}; their log: {log}", err=True)
        hide = hider(recipe.config)
        with log.open("w") as output, _progress(folder, steps, log, hide) as watch:
            failed = start(started, output, watch, **environment)
        if failed:
            end = hide("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
            raise click.ClickException(f"{' '.join(started)} ended with an error:\n{end}")
        yield folder / "run"


@contextmanager
def _progress(
    folder: Path, steps: int, log: Path, hide: Callable[[str], str]
) -> Iterator[Callable[[], None]]:
    """Yields a function that says on the standard error how far the run in `folder` is.

    Each new state is a line. A terminal also has the last words of the host, which show how far
    the download, the tokenisation or the scoring is.
    """
    from rich.console import Console
    from rich.text import Text

    record, step = folder / "run" / RECORD, folder / "run" / "bdpo" / STEP
    began = time.monotonic()
    console = Console(stderr=True)
    said = ""

    def watch() -> None:
        nonlocal said
        state = "loading the model, preparing and scoring the data"
        if record.is_file():
            done = step.read_text().strip() if step.is_file() else ""
            state = f"step {done or 0} of {steps}"
        if state != said:
            console.print(f"{time.monotonic() - began:6.0f} s  {state}", highlight=False)
            said = state
        if console.is_terminal:
            status.update(Text(visible(hide(_last_words(log)))))

    with console.status("") as status:
        yield watch


def _last_words(log: Path) -> str:
    """Returns the last line of a log, or the last state of a bar in it."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def prepare(
    recipe: Recipe, folder: Path, arguments: tuple[str, ...]
) -> tuple[list[str], dict[str, str]]:
    """Returns the command line that runs a recipe's first steps, and its environment variables.

    The run reuses neither scores nor prepared data of an earlier run, and writes only into
    `folder`. The learning rate schedule stays that of the whole run.

    Raises:
        click.ClickException: the recipe has no expected losses.
    """
    losses = recipe.about.get("expected", {}).get("losses")
    if not losses:
        raise click.ClickException(
            f"{recipe.path} says of no number what to expect: run it, and `bdpo recipes bundle` "
            "writes a recipe with its numbers"
        )
    config = part(recipe.host, "side_effects").without_side_effects(recipe.config, folder)
    config.pop("tokenized_path", None)  # LLaMA-Factory's data, prepared in an earlier run
    config["bdpo_cache_dir"] = str(folder / "scores")
    temporary = folder / "tmp"
    temporary.mkdir()
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    environment = {
        "BDPO_FIRST_STEPS": str(max(losses)),
        "BDPO_FIRST_STEPS_IN": config["output_dir"],
        "TMPDIR": str(temporary),
    }
    return command(recipe, file, arguments), environment
