"""The `bdpo` command. Each subcommand is one file and imports heavy modules only when it runs."""

from typing import Any

import click

from bdpo_plugin import __version__
from bdpo_plugin.cli.answers import answers
from bdpo_plugin.cli.compare import compare
from bdpo_plugin.cli.data import data
from bdpo_plugin.cli.doctor import doctor
from bdpo_plugin.cli.mi import mi
from bdpo_plugin.cli.plot import plot
from bdpo_plugin.cli.real import real
from bdpo_plugin.cli.recipes import recipes
from bdpo_plugin.cli.tiny import tiny
from bdpo_plugin.cli.train import train
from bdpo_plugin.settings import BDPOError


class _Commands(click.Group):
    """A group whose commands end with the message of a BDPOError, and no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BDPOError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bdpo-plugin")
def main() -> None:
    """Balanced Direct Preference Optimization: recipes, pictures, demos."""


for _command in (answers, compare, data, doctor, mi, plot, real, recipes, tiny, train):
    main.add_command(_command)
