"""The `bdpo` command, called in this process."""

from click.testing import CliRunner

from bdpo_plugin.cli import main


def bdpo(*arguments: str) -> tuple[int, str]:
    """Its exit status and all it printed; what it failed to turn into a message is raised."""
    result = CliRunner().invoke(main, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
