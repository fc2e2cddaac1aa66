"""`bdpo tiny`: writes the tiny model and the data of the demo to a folder."""

from pathlib import Path

import click

from bdpo_plugin.cli.options import FOLDER


@click.command()
@click.argument("directory", type=FOLDER)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of the weights, the text and the pairs."
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=300,
    show_default=True,
    help="Steps of pretraining, about 0.1 s each on two cores; 0 leaves the weights random.",
)
@click.option("--train-pairs", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--eval-pairs", type=click.IntRange(min=2), default=64, show_default=True)
def tiny(directory: Path, seed: int, steps: int, train_pairs: int, eval_pairs: int) -> None:
    """Make a tiny chat model and preference data in DIRECTORY, from nothing.

    Writes model/, train.jsonl, eval.jsonl and prompts.txt. The model answers harmless questions,
    and most mischievous ones too; the preference pairs teach it to refuse those. No network.
    """
    from bdpo_plugin.demo.tiny import write

    try:
        write(directory, seed=seed, steps=steps, train_pairs=train_pairs, eval_pairs=eval_pairs)
    except ValueError as error:  # more pairs than the grammar has
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote model/, train.jsonl, eval.jsonl and prompts.txt to {directory}")
