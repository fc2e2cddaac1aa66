"""`bdpo recipes verify`: runs the first steps of a recipe, and writes into it that they fit."""

from __future__ import annotations

from pathlib import Path

import click

from bdpo_plugin.cli.recipes.check import examine_run, show
from bdpo_plugin.private_text import private_in
from bdpo_plugin.recipes.recipe_file import find_recipe, recipe_root
from bdpo_plugin.settings import RECIPE
from bdpo_plugin.terminal import visible


@click.command()
@click.argument("name", metavar="FILE")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--by", required=True, metavar="NAME", help="Who ran it; others will read it.")
def verify(name: str, arguments: tuple[str, ...], by: str) -> None:
    """Run the first steps of FILE, a recipe or a bundle, and write into it that they fit.

    As `bdpo recipes check --run` does, which writes nothing; ARGUMENTS, after --, go to the host's
    command. What is written is an entry of `verified`: NAME, the hardware and the date. At the end
    it says how to send the recipe.

    Exit status 1: the run is not that of the recipe, and nothing was written.
    """
    recipe = find_recipe(name)
    if recipe.path.resolve().is_relative_to(recipe_root().resolve()):
        raise click.ClickException(
            f"{recipe.path} belongs to the package: `bdpo recipes copy {name}`, and verify the copy"
        )
    if (why := private_in(by)) is not None:
        raise click.ClickException(f"`--by {by}` {why}, which no recipe may have")
    checked = examine_run(recipe, arguments)
    show(checked)
    if checked.wrong:
        raise click.ClickException("nothing was written, as the run is not that of the recipe")
    recipe.path.write_text(recipe.with_verified(checked.verified(by)), encoding="utf-8")
    click.echo(f"Wrote to `{RECIPE}.verified` of {recipe.path}: {by}, {checked.hardware}")
    click.echo(visible(_how_to_send(recipe.path, recipe.about.get("author"))))


def _how_to_send(file: Path, author: object) -> str:
    to = f"its author ({author})" if author else "whoever you have the recipe from"
    words = f"To let others know, send {file} to {to}: the new entry is all that has changed."
    run_dir = file.parent.parent
    if (run_dir / "bdpo" / "run.json").is_file() and file.parent.name == "recipe":
        words += f" Or upload it with your own run: `bdpo recipes publish {run_dir}`."
    return words
