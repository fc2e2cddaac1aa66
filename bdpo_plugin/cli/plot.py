"""`bdpo plot`: draws a run's curves and the mutual information of its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bdpo_plugin.cli.options import EXISTING_FOLDER, FOLDER
from bdpo_plugin.output.run_folder import SCORES, named, read_run
from bdpo_plugin.terminal import visible

#: More than a person reads in one picture.
MOST_PANELS = 8


@click.command()
@click.argument("output_dirs", nargs=-1, required=True, type=EXISTING_FOLDER)
@click.option("--out", type=FOLDER, help="Folder for the pictures; default: the first OUTPUT_DIR.")
def plot(output_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the runs in OUTPUT_DIRS: curves.png and mi_scatter.png.

    curves.png has the loss, margin, accuracy, rewards, log-probabilities and weights, all runs in
    each panel; mi_scatter.png the mutual information of the training pairs, a panel for each B-DPO
    run.
    """
    figures = load_figures()
    from bdpo_plugin.cli.training_curves import curves

    runs = [read_run(directory, name) for directory, name in named(output_dirs)]
    out = out or output_dirs[0]
    out.mkdir(parents=True, exist_ok=True)
    click.echo(curves(runs, out / "curves.png"))
    scored = [(run.name, run.scores) for run in runs if run.measured]
    if scored:
        if len(scored) > MOST_PANELS:
            left_out = ", ".join(name for name, _ in scored[MOST_PANELS:])
            click.echo(f"mi_scatter.png has {MOST_PANELS} panels, without: {visible(left_out)}")
        click.echo(figures.mi_scatter(scored[:MOST_PANELS], out / "mi_scatter.png"))
    elif any(run.scores is not None for run in runs):
        click.echo("The mutual information was not measured (all weights are 1): no mi_scatter.png")
    else:
        click.echo(f"No {SCORES} in {output_dirs[0]}: not a B-DPO run, so no mi_scatter.png")


def load_figures() -> Any:
    """Imports the module that draws the pictures.

    Raises:
        click.ClickException: matplotlib is not installed.
    """
    try:
        from bdpo_plugin.cli import mi_figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise click.ClickException(
            "matplotlib is not installed: pip install 'bdpo-plugin[plot]'"
        ) from error
    return mi_figures
