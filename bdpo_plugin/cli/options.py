"""What options and tables of several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and no table.")


def console(width: int) -> Console:
    """Returns a console as wide as the terminal, or `width` columns wide if there is none.

    rich itself assumes 80 columns then, which is too narrow for several columns of prose."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=width)


def cell(text: str, style: str = "") -> Text:
    """Returns a text of unknown origin, safe to print, for a table."""
    from rich.text import Text

    return Text(visible(text), style)
