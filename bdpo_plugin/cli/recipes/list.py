"""`bdpo recipes list`: lists the recipes that come with the package."""

from __future__ import annotations

import json
from typing import Any

import click

from bdpo_plugin.recipes.recipe_file import is_sweep, read_recipe, recipe_files, recipe_root


def entries() -> list[dict[str, Any]]:
    """Returns a description of each recipe of the package, for the table and for JSON."""
    found = []
    for name, path in recipe_files(recipe_root()).items():
        if is_sweep(name):
            continue
        recipe = read_recipe(path, name)
        about = recipe.about
        found.append(
            {
                "name": name,
                "path": str(path),
                "title": about.get("title"),
                "host": recipe.host,
                "model": recipe.model,
                "method": recipe.method,
                "needs": about.get("needs"),
                "processes": about.get("processes"),
                "batch": about.get("batch"),
                "data": about.get("data", {}).get("command"),
                "measured": about.get("measured"),
                "verified": about.get("verified", []),
            }
        )
    return found


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="For a script.")
def list_(as_json: bool = False) -> None:
    """List the recipes that come with the package.

    `verified` says on what somebody has run it and met its expected numbers.
    """
    found = entries()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Recipes", title_justify="left")
    for heading in ("name", "model", "method", "needs", "verified"):
        table.add_column(heading, overflow="fold")
    for entry in found:
        verified = ", ".join(v["hardware"] for v in entry["verified"]) or "[dim]no[/]"
        table.add_row(*(entry[key] for key in ("name", "model", "method", "needs")), verified)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    sweeps = [name for name in recipe_files(recipe_root()) if is_sweep(name)]
    console.print(f"For `axolotl train RECIPE --sweep FILE`: {', '.join(sweeps)}", highlight=False)
