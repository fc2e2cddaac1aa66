"""`bdpo recipes`: the example configurations that come with the package."""

import shutil
from pathlib import Path

import click

import bdpo_plugin


def recipe_root() -> Path:
    """Where the recipes are: inside the installed wheel, or beside the package in a checkout."""
    package = Path(bdpo_plugin.__file__).parent
    places = (package / "example_configs", package.parent / "example_configs")
    for place in places:
        if place.is_dir():
            return place
    raise click.ClickException(
        f"no example configurations in {places[0]} or {places[1]}: install bdpo-plugin again"
    )


def recipe_files(root: Path) -> list[Path]:
    """All of them, in the order of their names."""
    return sorted(root.rglob("*.yml"))


def find_recipe(name: str) -> Path:
    """The one recipe called `name`, with or without its folder and its ``.yml``."""
    root = recipe_root()
    every = {path.relative_to(root).with_suffix("").as_posix(): path for path in recipe_files(root)}
    wanted = name.removesuffix(".yml")
    found = {short: path for short, path in every.items() if wanted in (short, path.stem)}
    if len(found) == 1:
        return found.popitem()[1]
    names = ", ".join(found or every)
    problem = "several recipes are" if found else "no recipe is"
    raise click.ClickException(f"{problem} called {name!r}; choose one of: {names}")


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the example configurations, or copy one."""
    if context.invoked_subcommand is None:
        root = recipe_root()
        for path in recipe_files(root):
            click.echo(f"{path.relative_to(root).as_posix():40} {path}")


@recipes.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), default=".")
def copy(name: str, destination: Path) -> None:
    """Copy the recipe NAME to DESTINATION, a folder or a new file. Never overwrites."""
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise click.ClickException(f"{target} exists already: name another DESTINATION")
    if not target.parent.is_dir():
        raise click.ClickException(f"there is no folder {target.parent}: make it first")
    shutil.copyfile(source, target)
    click.echo(f"Copied to {target}")
