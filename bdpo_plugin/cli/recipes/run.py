"""`bdpo recipes run`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.limits import check_complete
from bdpo_plugin.recipes.recipe_file import Recipe, find_recipe
from bdpo_plugin.settings import BDPOError

_TOOLS = {"axolotl": "axolotl", "llamafactory": "llamafactory-cli"}


def command(recipe: Recipe, file: Path, arguments: tuple[str, ...]) -> list[str]:
    """The host's own command line for a file.

    Raises:
        click.ClickException: the host is not installed here.
    """
    tool = _TOOLS[recipe.host]
    beside = Path(sys.executable).with_name(tool)
    found = str(beside) if beside.is_file() else shutil.which(tool)
    if found is None:
        raise click.ClickException(
            f"{recipe.name} is a recipe of {recipe.host}, whose command `{tool}` is not installed "
            "in this environment"
        )
    return [found, "train", str(file), *arguments]


def start(words: list[str], output: Any = None, **environment: str) -> int:
    """Run a host's command with some environment variables more; its exit status.

    Args:
        output: the open file that all it prints goes to; None is where ours goes. With a file, the
            command and all that it starts end where we are interrupted.
    """
    env = {**os.environ, **environment}
    if output is None:
        return subprocess.run(words, env=env, check=False).returncode
    options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, env=env, start_new_session=True, **options)
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and its group: what is left of it would write into folders that are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, name: str, arguments: tuple[str, ...]) -> None:
    """Run the recipe NAME by its host's command, with further ARGUMENTS of that.

    Its paths are relative to the folder that you are in; `bdpo recipes copy` says what makes its
    data.
    """
    recipe = find_recipe(name)
    try:
        check_complete(recipe.config)
    except BDPOError as error:
        raise click.ClickException(f"{recipe.path}: {error}") from error
    context.exit(start(command(recipe, recipe.path, arguments)))
