"""`bdpo recipes list`: lists the recipes that come with the package."""

from __future__ import annotations

import json
from typing import Any

import click

from bdpo_plugin.cli.options import console
from bdpo_plugin.hosts import part
from bdpo_plugin.recipes.recipe_file import (
    Recipe,
    is_sweep,
    read_recipe,
    recipe_files,
    recipe_root,
)

_CAPTION = (
    "GiB, and the hours on GPUs of 24, 48 and 80 GB, are estimated by formula, not measured. GiB: "
    "of each GPU, at the longest sequences that the recipe allows. Hours: of the first epoch over "
    '20,000 pairs, with scoring; "no" where the run does not fit. docs/recipes.md says what they '
    "assume; `bdpo doctor FILE` looks at your own data."
)


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
                "estimate": _estimate(recipe),
                "data": about.get("data", {}).get("command"),
                "measured": about.get("measured"),
                "verified": about.get("verified", []),
            }
        )
    return found


def _estimate(recipe: Recipe) -> dict[str, Any]:
    """Returns what the formulas of `bdpo doctor` give: the memory of each GPU, and the hours of
    20,000 pairs on GPUs of three sizes, None where the run does not fit."""
    from bdpo_plugin.inspection.gpus import CARDS, needs_of
    from bdpo_plugin.inspection.model_shape import known_shapes

    plan = part(recipe.host, "plan").plan_of(recipe.config)
    needs = needs_of(known_shapes()[recipe.model], plan, recipe.about.get("processes", 1))
    hours = {f"{card.gigabytes} GB": h for card, h in zip(CARDS, needs.hours, strict=True)}
    return {"memory_gib": needs.memory.peak, "hours": hours}


def in_hours(hours: float | None) -> str:
    """Returns estimated hours as text."""
    if hours is None:
        return "no"
    return f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="For a script.")
def list_(as_json: bool = False) -> None:
    """List the recipes that come with the package.

    `needs` is the hardware that a recipe is written for. The memory and the hours are estimated by
    formula. `verified` says on what somebody has run it and met its expected numbers.
    """
    found = entries()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table(title="Recipes", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("needs", overflow="fold")
    for heading in ("GiB", *found[0]["estimate"]["hours"]):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verified", overflow="fold")
    for entry in found:
        estimate = entry["estimate"]
        hours = map(in_hours, estimate["hours"].values())
        verified = ", ".join(v["hardware"] for v in entry["verified"]) or "[dim]no[/]"
        memory = f"{estimate['memory_gib']:.1f}"
        table.add_row(entry["name"], entry["needs"], memory, *hours, verified)
    screen = console(120)
    screen.print(table)
    screen.print(_CAPTION, highlight=False)
    sweeps = [name for name in recipe_files(recipe_root()) if is_sweep(name)]
    screen.print(f"For `axolotl train RECIPE --sweep FILE`: {', '.join(sweeps)}", highlight=False)
