"""`bdpo recipes pin`: writes the current commits of model and data into a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import click

from bdpo_plugin.cli.options import EXISTING_FILE
from bdpo_plugin.output.card_facts import is_local
from bdpo_plugin.recipes.hub import asking
from bdpo_plugin.recipes.recipe_file import Recipe, read_recipe
from bdpo_plugin.recipes.schema import sound
from bdpo_plugin.recipes.shareable import is_pinned, revision


@click.command()
@click.argument("file", type=EXISTING_FILE)
def pin(file: Path) -> None:
    """Write the commits of the model and of the data that the hub has now into FILE.

    What is pinned already stays. Needs a network. Models and data that are paths have no commit.
    """
    recipe = sound(read_recipe(file, str(file)))
    pinned = {}
    with asking("the hub does not answer") as hub:
        if not is_local(recipe.model) and not is_pinned(revision(recipe)):
            wanted = revision(recipe) or "main"
            pinned[recipe.model] = str(hub.model_info(recipe.model, revision=wanted).sha)
            recipe = _with_model(recipe, pinned[recipe.model])
        data = recipe.about.get("data", {})
        if "source" in data and not is_pinned(data.get("revision")):
            wanted = data.get("revision") or "main"
            commit = str(hub.dataset_info(data["source"], revision=wanted).sha)
            pinned[data["source"]] = commit
            command = str(data.get("command", ""))
            if command and "--revision" not in command:
                command = f"{command} --revision {commit}"
            new = {**data, "command": command, "revision": commit}
            about = {**recipe.about, "data": {k: v for k, v in new.items() if v}}
            text = recipe.with_about(about)
            recipe = Recipe(recipe.name, file, text, recipe.config, about)
    file.write_text(recipe.text, encoding="utf-8")
    for name, commit in pinned.items():
        click.echo(f"{name}: {commit}")
    if not pinned:
        click.echo("Nothing to pin")


def _with_model(recipe: Recipe, commit: str) -> Recipe:
    """Returns the recipe with the model's revision, in the line below the model's name."""
    keys = f"{recipe.key('revision')}|model_revision"
    text = re.sub(rf"^(?:{keys}):.*\n", "", recipe.text, flags=re.MULTILINE)
    line = rf"^({recipe.key('model')}:.*)$"
    text = re.sub(line, rf"\1\n{recipe.key('revision')}: {commit}", text, count=1, flags=re.M)
    config = {**recipe.config, recipe.key("revision"): commit}
    return Recipe(recipe.name, recipe.path, text, config, recipe.about)
