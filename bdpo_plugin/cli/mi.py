"""`bdpo mi`: measures the mutual information of a training set before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdpo_plugin.cli.doctor import hider
from bdpo_plugin.cli.no_side_effects import no_side_effects, stdout_to_stderr
from bdpo_plugin.cli.options import EXISTING_FILE, FOLDER, JSON, console
from bdpo_plugin.cli.pair_labels import find_labels, label_colours
from bdpo_plugin.cli.plot import load_figures
from bdpo_plugin.hosts import part
from bdpo_plugin.recipes.host_config import (
    check_installed,
    check_model,
    check_model_name,
    check_preference,
    read_config,
)
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    import numpy as np

    from bdpo_plugin.inspection.scored_pairs import Scored


@click.command()
@click.argument("config", required=False, type=EXISTING_FILE)
@click.option("--model", help="Name or folder, where there is no CONFIG.")
@click.option("--dataset", help="A JSON, JSONL or Parquet file, or a name on the hub.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens of a pair's longer sequence, with --model.",
)
@click.option(
    "--output", type=FOLDER, help="Folder for the output; default: bdpo-mi/ beside CONFIG."
)
@click.option(
    "--label",
    help="Column that colours the pairs; default: `label`, or else the one column of the data "
    "with a few different texts.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=5, show_default=True, help="Pairs shown."
)
@click.option(
    "--split",
    type=click.Choice(["balanced", "imbalanced"]),
    help="Also write the pairs with the least, or the greatest, imbalance, in the data's own "
    "format.",
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the pairs that --split writes.",
)
@JSON
def mi(
    config: Path | None,
    model: str | None,
    dataset: str | None,
    max_length: int,
    output: Path | None,
    label: str | None,
    top: int,
    split: str | None,
    fraction: float | None,
    as_json: bool,
) -> None:
    """Measure the mutual information of the training pairs of CONFIG, and train nothing.

    CONFIG is a YAML of Axolotl, LLaMA-Factory or `bdpo train`, with or without B-DPO; without one,
    --model and --dataset. The scores go to where the training will look for them, which then
    computes none again. Writes mi.png, the paper's Figure 2, and mi.html, in which each pair can be
    read; what the host says goes to the standard error.
    """
    if (config is None) == (model is None or dataset is None):
        raise click.UsageError("Give a CONFIG, or --model and --dataset.")
    if (split is None) != (fraction is None):
        raise click.UsageError("--split and --fraction go together.")
    figures = load_figures()
    output = output or (config.parent if config else Path()) / "bdpo-mi"
    output.mkdir(parents=True, exist_ok=True)
    scored = _score(config, model, dataset, output, max_length)

    from bdpo_plugin.cli.page import write_page
    from bdpo_plugin.inspection.explained import conclusions, explain

    name, labels = find_labels(scored, label)
    colours = label_colours(labels)
    side = {c: scored.table[c].to_numpy() for c in ("mi_chosen", "mi_rejected")}
    imbalance = abs(side["mi_chosen"] - side["mi_rejected"])
    unit = scored.table.schema.metadata[b"mi_unit"].decode()
    title = config.name if config else f"{model}, {dataset}"
    found = explain(
        (side["mi_chosen"], side["mi_rejected"]),
        (scored.table["chosen_tokens"].to_numpy(), scored.table["rejected_tokens"].to_numpy()),
        ([text.chosen for text in scored.texts], [text.rejected for text in scored.texts]),
        labels,
    )
    notes = list(conclusions(found, name))
    written = {
        "picture": figures.imbalance(*side.values(), labels, colours, unit, output / "mi.png"),
        "page": write_page(scored, (name, labels, colours), notes, unit, title, output / "mi.html"),
        "scores": output / "bdpo" / "reference_scores.parquet",
    }
    result = {
        "pairs": len(imbalance),
        "unit": unit,
        "chosen higher": float((side["mi_chosen"] > side["mi_rejected"]).mean()),
        "rejected higher": float((side["mi_chosen"] < side["mi_rejected"]).mean()),
        "mean imbalance": float(imbalance.mean()),
        "chosen negative": found.negative[0],
        "rejected negative": found.negative[1],
        "explained": found.shares,
        **{k: str(v) for k, v in written.items()},
    }
    if split and fraction:
        result |= write_split(scored, imbalance, split, fraction, output)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _show(scored, result, imbalance, labels, name, top)
        click.echo("\n".join(notes))


def _score(
    config: Path | None, model: str | None, dataset: str | None, output: Path, max_length: int
) -> Scored:
    from bdpo_plugin.settings import BDPOError

    if config is not None:
        found = read_config(config)
        check_preference(config, found)
        check_installed(found.host)
    try:
        with stdout_to_stderr(), no_side_effects():
            scored: Scored
            if config is not None:
                check_model(found.host, found.keys)
                scored = part(found.host, "scoring").score(config, output)
            else:
                check_model_name(str(model), f"--model {model}")
                score = part("trl", "scoring").score_dataset
                scored = score(str(model), str(dataset), output, max_length)
            return scored
    except BDPOError as error:
        hide = hider({} if config is None else found.keys)
        raise click.ClickException(hide(str(error))) from error


def write_split(
    scored: Scored, imbalance: np.ndarray, split: str, fraction: float, output: Path
) -> dict[str, Any]:
    """Writes the share of the pairs with the least, or the greatest, imbalance.

    Args:
        scored: the pairs.
        imbalance: (B,) absolute difference between the MI of the two responses.
        split: ``balanced`` or ``imbalanced``.
        fraction: share of the pairs to write.
        output: the folder to write to.

    Returns:
        The files and the number of pairs, for the command's result.

    Raises:
        click.ClickException: it is not known from which dataset row a pair was made.
    """
    from bdpo_plugin.cli.subset import write_subset

    order = imbalance.argsort(kind="stable")
    count = max(1, round(fraction * len(order)))
    chosen = order[:count] if split == "balanced" else order[::-1][:count]
    places = [scored.places[i] for i in chosen]
    if lost := sum(place is None for place in places):
        raise click.ClickException(
            f"--split: the row of the data that {lost} of {count} pairs were made of is not known. "
            "That is so for data that was prepared beforehand (Axolotl without a `type`, "
            "LLaMA-Factory's `tokenized_path`)"
        )
    files = []
    names = [source.file.stem if source.file else "data" for source in scored.sources]
    for number, source in enumerate(scored.sources):
        rows = [place.row for place in places if place and place.source == number]
        name = names[number]
        if names.count(name) > 1 or source.file is None:  # files of one name in several folders
            name += f"-{number}"
        if rows:
            files.append(str(write_subset(source, rows, output, f"{name}-{split}")))
    return {split: files, f"{split} pairs": count}


def _show(
    scored: Scored,
    result: dict[str, Any],
    imbalance: np.ndarray,
    labels: Sequence[str] | None,
    label: str | None,
    top: int,
) -> None:
    from rich.table import Table
    from rich.text import Text

    def short(text: str) -> Text:
        line = " ".join(visible(text).split())
        return Text(line if len(line) <= 160 else line[:159] + "…")

    screen = console(120)
    if top:
        table = Table(title="The most imbalanced pairs", title_justify="left", show_lines=True)
        for heading in ("MI chosen", "MI rejected"):
            table.add_column(heading, justify="right", width=8)
        if label:
            table.add_column(visible(label))
        for heading in ("Query", "Chosen", "Rejected"):
            table.add_column(heading, ratio=1, overflow="fold")
        for i in imbalance.argsort(kind="stable")[::-1][:top]:
            texts = scored.texts[i]
            cells = [
                Text(f"{scored.table[c][i].as_py():.3f}") for c in ("mi_chosen", "mi_rejected")
            ]
            cells += [short(labels[i])] if labels else []
            table.add_row(*cells, *map(short, (texts.query, texts.chosen, texts.rejected)))
        screen.print(table)
    table = Table(show_header=False)
    table.add_row("pairs", f"{result['pairs']:,}")
    table.add_row("chosen understood better", f"{result['chosen higher']:.1%}")
    table.add_row("rejected understood better", f"{result['rejected higher']:.1%}")
    table.add_row("mean imbalance", f"{result['mean imbalance']:.3f} {result['unit']}")
    for name in ("picture", "page", "scores"):
        table.add_row(name, Text(result[name]))
    for split in ("balanced", "imbalanced"):
        for file in result.get(split, ()):
            table.add_row(f"{split}, {result[f'{split} pairs']:,} pairs", Text(file))
    screen.print(table)
