"""Runs the first steps of a recipe with its host, for `bdpo recipes check --run`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml

from bdpo_plugin.cli.doctor import hider
from bdpo_plugin.cli.looking import looking
from bdpo_plugin.cli.recipes.run import command, start
from bdpo_plugin.recipes.host_config import check_model
from bdpo_plugin.recipes.measured import STEPS
from bdpo_plugin.recipes.recipe_file import Recipe


@contextmanager
def run_first_steps(recipe: Recipe, arguments: tuple[str, ...]) -> Iterator[Path]:
    """Runs the first steps of a recipe with its host's command, and yields their output folder.

    The folder is removed when the context ends.

    Raises:
        click.ClickException: the recipe has no expected numbers, its model cannot be loaded, or the
            host ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="bdpo-recipe-") as name, looking():
        folder = Path(name)
        started, environment = prepare(recipe, folder, arguments)
        check_model(recipe.host, recipe.config)
        log = folder / "log.txt"
        click.echo(f"Running the first steps of {recipe.path}; their log: {log}", err=True)
        with log.open("w") as output:
            failed = start(started, output, **environment)
        if failed:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            end = hider(recipe.config)(end)
            raise click.ClickException(f"{' '.join(started)} ended with an error:\n{end}")
        yield folder / "run"


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
    of_host: Any
    if recipe.host == "axolotl":
        from bdpo_plugin.hosts.axolotl import side_effects as of_host
    elif recipe.host == "trl":
        from bdpo_plugin.hosts.trl import side_effects as of_host
    else:
        from bdpo_plugin.hosts.llamafactory import side_effects as of_host

    config = of_host.for_looking(recipe.config, folder)
    config.pop("tokenized_path", None)  # LLaMA-Factory's data, prepared in an earlier run
    config["bdpo_cache_dir"] = str(folder / "scores")
    temporary = folder / "tmp"
    temporary.mkdir()
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    steps = max(STEPS, *losses) if max(losses) > STEPS else max(losses)
    environment = {
        "BDPO_FIRST_STEPS": str(steps),
        "BDPO_FIRST_STEPS_IN": config["output_dir"],
        "TMPDIR": str(temporary),
    }
    return command(recipe, file, arguments), environment
