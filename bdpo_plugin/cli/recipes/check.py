"""`bdpo recipes check`: checks that a recipe is valid and can be shared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bdpo_plugin.cli.no_side_effects import stdout_to_stderr
from bdpo_plugin.cli.options import cell, console
from bdpo_plugin.hosts import part
from bdpo_plugin.recipes.recipe_file import Recipe, find_recipe
from bdpo_plugin.recipes.run_numbers import yaml_lines
from bdpo_plugin.recipes.shareable import Finding, findings
from bdpo_plugin.settings import RECIPE
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    from bdpo_plugin.recipes.expected import Compared


class Checked(NamedTuple):
    """What a check of a recipe found.

    Attributes:
        findings: errors and warnings.
        rows: what its first steps were compared in, if they were run.
        hardware: on which these ran, in words.
    """

    findings: list[Finding]
    rows: Sequence[Compared] = ()
    hardware: str = ""

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)

    def verified(self, by: str) -> dict[str, str]:
        """Returns the entry that this check adds to `verified`."""
        return {"by": by, "hardware": self.hardware, "date": datetime.now(UTC).date().isoformat()}


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
    checked = examine_run(recipe, arguments) if first_steps else examine(recipe)
    if as_json:
        click.echo(json.dumps(_as_json(checked), indent=1))
    else:
        show(checked)
    if checked.wrong:
        context.exit(1)
    if not as_json:
        click.echo(f"{recipe.path}: nothing wrong")
        if checked.rows:
            line = yaml_lines({"verified": [checked.verified("YOUR NAME")]})
            click.echo(
                f"The run is that of the recipe. To say so, put this under `{RECIPE}` in it:\n\n"
                f"{line}\nor let `bdpo recipes verify {name} --by 'YOUR NAME'` run it again and "
                "write it."
            )
        elif recipe.about.get("expected"):
            click.echo("--run compares its first steps with the numbers that it expects")


def examine(recipe: Recipe) -> Checked:
    """Checks a recipe without running it."""
    with stdout_to_stderr():  # hosts write their logs to stdout
        return Checked([*findings(recipe), *_host(recipe), *_versions(recipe)])


def examine_run(recipe: Recipe, arguments: tuple[str, ...]) -> Checked:
    """Checks a recipe and, if nothing is wrong, compares its first steps, which it runs."""
    from bdpo_plugin.cli.recipes.first_steps import run_first_steps
    from bdpo_plugin.recipes.expected import compare, compared
    from bdpo_plugin.recipes.run_numbers import hardware_of

    checked = examine(recipe)
    if checked.wrong:
        return checked
    with run_first_steps(recipe, arguments) as output:
        rows = compared(recipe, output)
        found = [*checked.findings, *compare(recipe, output, rows)]
        return Checked(found, rows, hardware_of(output))


def show(checked: Checked) -> None:
    """Prints a check: what was compared and how near it is, then the findings."""
    if checked.rows:
        from rich.table import Table

        table = Table(title="The first steps", title_justify="left")
        for heading in ("", "here", "expected", "apart", "tolerance", ""):
            table.add_column(heading, overflow="fold")
        for row in checked.rows:
            values = [row.what, _shown(row.here), _shown(row.expected)]
            near = ["", ""] if row.apart is None else [f"{row.apart:.2g}", str(row.tolerance)]
            mark = cell("same", "green") if row.same else cell("DIFFERS", "bold red")
            table.add_row(*map(cell, [*values, *near]), mark)
        console(100).print(table)
    tell(checked.findings)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{32}", text) else text


def _as_json(checked: Checked) -> dict[str, Any]:
    rows = [
        {**row._asdict(), "here": None if row.here != row.here else row.here, "same": row.same}
        for row in checked.rows  # NaN, which no JSON has, is not equal to itself
    ]
    return {"findings": [finding._asdict() for finding in checked.findings], "compared": rows}


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
    for problem in part(recipe.host, "recipe_validation").problems(recipe.config, processes):
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
