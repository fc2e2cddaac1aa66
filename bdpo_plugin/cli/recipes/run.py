"""`bdpo recipes run`: runs a recipe with the command of its host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.limits import check_complete
from bdpo_plugin.recipes.host_config import HOSTS
from bdpo_plugin.recipes.recipe_file import Recipe, find_recipe
from bdpo_plugin.settings import BDPOError


def command(recipe: Recipe, file: Path, arguments: tuple[str, ...]) -> list[str]:
    """Returns the host's command line that trains with the configuration `file`.

    Raises:
        click.ClickException: the host is not installed in this environment.
    """
    tool = HOSTS[recipe.host].tool
    beside = Path(sys.executable).with_name(tool)
    found = str(beside) if beside.is_file() else shutil.which(tool)
    if found is None:
        raise click.ClickException(
            f"{recipe.name} is a recipe of {recipe.host}, whose command `{tool}` is not installed "
            "in this environment"
        )
    return [found, "train", str(file), *arguments]


def start(
    words: list[str],
    output: Any = None,
    watch: Callable[[], None] | None = None,
    **environment: str,
) -> int:
    """Runs a host's command with additional environment variables, and returns its exit status.

    Args:
        words: the command line.
        output: an open file for everything that the command prints; None inherits our streams. With
            a file, an interruption of this process ends the command and all its child processes.
        watch: is called every second while the command runs into a file.
        environment: the additional environment variables.
    """
    env = {**os.environ, **environment}
    if output is None:
        return subprocess.run(words, env=env, check=False).returncode
    options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, env=env, start_new_session=True, **options)
    try:
        while True:
            if watch is not None:
                watch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and its process group, which would else write to removed folders."""
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
