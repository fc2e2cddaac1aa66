"""`bdpo recipes show`: prints a recipe and the numbers to expect from it."""

from __future__ import annotations

import json
from typing import Any

import click

from bdpo_plugin.recipes.recipe_file import find_recipe
from bdpo_plugin.recipes.schema import sound
from bdpo_plugin.terminal import visible


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For a script.")
def show(name: str, as_json: bool) -> None:
    """Show the recipe NAME: its YAML, and the numbers to expect."""
    recipe = sound(find_recipe(name))
    if as_json:
        shown = {"host": recipe.host, "config": recipe.config, "about": recipe.about}
        click.echo(json.dumps(shown, indent=1, default=str))
        return
    click.echo(visible(recipe.text.rstrip()))
    expected = recipe.about.get("expected")
    if not expected:
        click.echo("\nNobody has yet run it and said what to expect.")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What to expect", title_justify="left", show_header=False)
    for words, value in _rows(expected, recipe.about):
        table.add_row(words, Text(visible(value)))
    click.echo()
    Console(width=100).print(table)


def _rows(expected: dict[str, Any], about: dict[str, Any]) -> list[tuple[str, str]]:
    tolerance = expected.get("tolerance", {})
    rows = [("pairs after filtering", str(expected.get("pairs")))]
    for side in ("chosen", "rejected"):
        values = " / ".join(f"{value:.3f}" for value in expected.get(f"mi_{side}", ()))
        rows.append((f"MI of {side} (5/50/95 %)", f"{values}, ± {tolerance.get('mi')}"))
    losses = ", ".join(f"{step}: {loss:.4f}" for step, loss in expected.get("losses", {}).items())
    rows.append(("loss at step", f"{losses}, ± {tolerance.get('loss')}"))
    for key, value in about.get("measured", {}).items():
        rows.append((key, str(value)))
    return rows
