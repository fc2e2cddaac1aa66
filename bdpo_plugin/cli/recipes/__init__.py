"""`bdpo recipes`: configurations that others can run again. Each of its commands is one file."""

import click

from bdpo_plugin.cli.recipes.bundle import bundle
from bdpo_plugin.cli.recipes.check import check
from bdpo_plugin.cli.recipes.copy import copy
from bdpo_plugin.cli.recipes.list import list_
from bdpo_plugin.cli.recipes.pin import pin
from bdpo_plugin.cli.recipes.publish import publish
from bdpo_plugin.cli.recipes.run import run
from bdpo_plugin.cli.recipes.show import show
from bdpo_plugin.cli.recipes.verify import verify


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """Configurations to begin from, and to run again: list, copy, check, share.

    A recipe is a YAML of Axolotl, LLaMA-Factory or TRL as it runs, with a mapping `bdpo_recipe`
    that says what it needs and what came of it. NAME is one of `bdpo recipes list`, or a file.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


for _command in (bundle, check, copy, list_, pin, publish, run, show, verify):
    recipes.add_command(_command)
