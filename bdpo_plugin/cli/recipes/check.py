"""`bdpo recipes check`: checks that a recipe is valid and can be shared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from bdpo_plugin.recipes.recipe_file import Recipe, find_recipe
from bdpo_plugin.recipes.shareable import Finding, findings
from bdpo_plugin.settings import RECIPE
from bdpo_plugin.terminal import visible


@click.command()
@click.argument("name", metavar="FILE")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--run", "first_steps", is_flag=True, help="Run its first ten steps and compare.")
@click.option("--json", "as_json", is_flag=True, help="For a script.")
@click.pass_context
def check(
    context: click.Context, name: str, arguments: tuple[str, ...], first_steps: bool, as_json: bool
) -> None:
    """Check a recipe: a FILE, the folder of a bundle, or a NAME.

    By its host's own validation, if that is installed here, and by what sharing needs: no token or
    key, no address, no path of this machine, no remote code that may change, no misspelt key, and
    a way for others to the model and the data. No network.

    --run scores the data and runs the first steps, in a folder that is removed again, and compares
    with what the recipe expects: settings and rows, which must be the same, and mutual information
    and losses, within its tolerances. ARGUMENTS, after --, go to the host's command.

    Exit status 1: something is wrong. Warnings leave it 0.
    """
    recipe = find_recipe(name)
    near = ""
    with redirect_stdout(sys.stderr):  # hosts write their logs to stdout
        found = [*findings(recipe), *_host(recipe), *_versions(recipe)]
    if first_steps and not any(finding.wrong for finding in found):
        from bdpo_plugin.cli.recipes.first_steps import run_first_steps
        from bdpo_plugin.recipes.expected import compare, nearness

        with run_first_steps(recipe, arguments) as output:
            found += compare(recipe, output)
            if not any(finding.wrong for finding in found):
                near = f": {nearness(recipe, output)}"
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        tell(found)
    if any(finding.wrong for finding in found):
        context.exit(1)
    if not as_json:
        click.echo(f"{recipe.path}: nothing wrong{near}")


def tell(found: list[Finding]) -> None:
    """Prints the findings, one line each."""
    for wrong, where, what in found:
        kind = click.style("wrong", fg="red") if wrong else click.style("warning", fg="yellow")
        click.echo(f"{kind}: {f'{where}: ' if where else ''}{visible(what)}")


def _host(recipe: Recipe) -> Iterator[Finding]:
    if find_spec(recipe.host) is None:
        what = f"{recipe.host} is not installed here: its own validation was left out"
        yield Finding(False, "", what)
        return
    processes = recipe.about.get("processes")
    processes = processes if isinstance(processes, int) else 1
    if recipe.host == "axolotl":
        from bdpo_plugin.hosts.axolotl.recipe_validation import problems as of_axolotl

        found = of_axolotl(recipe.config, processes)
    elif recipe.host == "trl":
        from bdpo_plugin.hosts.trl.recipe_validation import problems as of_trl

        found = of_trl(recipe.config)
    else:
        from bdpo_plugin.hosts.llamafactory.recipe_validation import problems as of_llamafactory

        found = of_llamafactory(recipe.config)
    for problem in found:
        yield Finding(True, recipe.host, problem)


def _versions(recipe: Recipe) -> Iterator[Finding]:
    recorded = recipe.about.get("versions")
    if not isinstance(recorded, dict):
        return
    for package, theirs in recorded.items():
        try:
            ours = version(package)
        except PackageNotFoundError:
            ours = "none"
        same = ours.partition("+")[0] == str(theirs).partition("+")[0]  # torch: "+cu128", "+cpu"
        if not same and package != "python":
            what = f"{package} {ours} is installed, it was run with {theirs}"
            yield Finding(False, f"`{RECIPE}.versions`", what)
