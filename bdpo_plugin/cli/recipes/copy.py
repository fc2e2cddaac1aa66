"""`bdpo recipes copy`: copies a recipe of the package to a folder of the user."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from bdpo_plugin.recipes.host_config import HOSTS
from bdpo_plugin.recipes.recipe_file import find_file, is_sweep, read_recipe, recipe_root
from bdpo_plugin.terminal import visible


@click.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), default=".")
def copy(name: str, destination: Path) -> None:
    """Copy the recipe NAME to DESTINATION, a folder or a new file, and say what makes its data.

    Never overwrites.
    """
    source = find_file(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise click.ClickException(f"{target} exists already: name another DESTINATION")
    if not target.parent.is_dir():
        raise click.ClickException(f"there is no folder {target.parent}: make it first")
    shutil.copyfile(source, target)
    click.echo(f"Copied to {target}")
    if is_sweep(source.relative_to(recipe_root()).as_posix()):
        click.echo(f"axolotl train RECIPE --sweep {target}")
        return
    recipe = read_recipe(source, name)
    if command := recipe.about.get("data", {}).get("command"):
        click.echo(f"Its data, relative to where you run it: {visible(command)}")
    click.echo(f"Then: {HOSTS[recipe.host].command} {target}")
