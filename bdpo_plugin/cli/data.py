"""`bdpo data`: converts public preference data to pairs that both hosts read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdpo_plugin.cli.options import EXISTING_FOLDER
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources import hh_rlhf as hh
from bdpo_plugin.sources import pku_saferlhf as pku
from bdpo_plugin.sources import xstest as xs
from bdpo_plugin.sources.selection import Sorted, select, write

_FILE = click.Path(dir_okay=False, path_type=Path)


_OUTPUT = click.option("--output", type=_FILE, required=True, help="JSON lines are written to it.")
_SEED = click.option(
    "--seed", default=0, show_default=True, help="Seed of the random choice and order."
)
_REVISION = click.option("--revision", help="Commit of the hub's dataset.  [default: the newest]")
_FORM = "A file in that one's form, or a dataset of the hub."


@click.group()
def data() -> None:
    """Make a training set of public preference data.

    Each command writes JSON lines that Axolotl (type: chat_template.default) and LLaMA-Factory
    (dataset_info.json, beside the file) read, with a column `label` for `bdpo mi` and for
    `bdpo_control: shuffled:label`; and a manifest, with counts, what was left out and why, and a
    hash of each row. The same data, options and seed give the same file.
    """


@data.command("pku-saferlhf")
@click.option("--data", default=pku.HUB, show_default=True, help=_FORM)
@_REVISION
@click.option(
    "--unsafe",
    default=10_000,
    show_default=True,
    type=click.IntRange(min=0),
    help="Pairs with one safe response, which is chosen.",
)
@click.option(
    "--safe",
    default=10_000,
    show_default=True,
    type=click.IntRange(min=0),
    help="Pairs of two safe responses, of which the better one is chosen.",
)
@_OUTPUT
@_SEED
def pku_saferlhf(
    data: str, revision: str | None, unsafe: int, safe: int, output: Path, seed: int
) -> None:
    """The paper's training set, from PKU-SafeRLHF (CC-BY-NC-4.0): a pair for each query.

    The paper's sizes are the defaults. A row of two unsafe responses has no pair.
    """

    sizes = {"unsafe": unsafe, "safe": safe}
    source = _source("pku-saferlhf", data, revision, **sizes)
    _make(pku.sort(pku.load_rows(data, revision)), sizes, output, seed, source)


@data.command("hh-rlhf")
@click.option("--data", default=hh.HUB, show_default=True, help=_FORM)
@_REVISION
@click.option(
    "--subset",
    default=hh.SUBSETS[0],
    show_default=True,
    type=click.Choice(hh.SUBSETS),
    help="Its folder on the hub. The label is its first word.",
)
@click.option("--pairs", type=click.IntRange(min=1), help="[default: all]")
@_OUTPUT
@_SEED
def hh_rlhf(
    data: str, revision: str | None, subset: str, pairs: int | None, output: Path, seed: int
) -> None:
    """Pairs of conversations from hh-rlhf (MIT), of several turns, a pair for each beginning."""

    sizes = {subset.partition("-")[0]: pairs} if pairs else {}
    source = _source("hh-rlhf", data, revision, subset=subset, pairs=pairs)
    _make(hh.sort(data, subset, revision), sizes, output, seed, source)


@data.command()
@click.option(
    "--data",
    required=True,
    type=EXISTING_FOLDER,
    help="The folder with the labelled answers: a CSV file, also as .gz, for each model.",
)
@click.option("--types", help="Types of prompts, with commas between.  [default: all]")
@click.option(
    "--per-prompt",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="The most pairs of one prompt, each of other models' answers.",
)
@_OUTPUT
@_SEED
def xstest(data: Path, types: str | None, per_prompt: int, output: Path, seed: int) -> None:
    """Pairs from the labelled answers of XSTest (CC-BY-4.0; the answers: their models' licences).

    On an unsafe prompt a full refusal is chosen and a full compliance rejected, on a safe prompt
    that sounds unsafe the reverse. Each pair has the prompt's type and the answers' models, so that
    whole types can be held out. The folder is that of github.com/paul-rottger/exaggerated-safety
    (older: xstest), with the files that have a column final_label.
    """

    answers = xs.read_answers(data)
    chosen = [part.strip() for part in types.split(",")] if types is not None else None
    known = {answer.type for answer in answers}
    if unknown := sorted(set(chosen or []) - known):
        raise BDPOError(f"--types: {', '.join(unknown)} is none of {', '.join(sorted(known))}")
    source = _source("xstest", str(data), None, types=types, per_prompt=per_prompt)
    _make(xs.sort(answers, chosen), {}, output, seed, source, per_prompt=per_prompt)


def _source(name: str, data: str, revision: str | None, **options: Any) -> dict[str, Any]:
    """Describes the input for the manifest. It has no path, as the manifest is to be shared."""
    path = Path(data)
    files = sorted(path.glob("*.csv*")) if path.is_dir() else [path] if path.is_file() else []
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    where = {"sha256": hashes} if files else {"dataset": data, "revision": revision}
    return {"name": name, **where, **options}


def _make(
    rows: Iterable[Sorted],
    sizes: dict[str, int],
    output: Path,
    seed: int,
    source: dict[str, Any],
    per_prompt: int = 1,
) -> None:
    screen = Console(stderr=True)
    with screen.status("Reading and choosing"):
        pairs, counts = select(rows, sizes, seed=seed, per_prompt=per_prompt)
    if not pairs:
        raise BDPOError(f"there is no pair in it: {counts}")
    write(pairs, output, counts=counts, source=source | {"seed": seed})
    table = Table(title=f"{source['name']}: {len(pairs)} pairs", title_justify="left")
    table.add_column("rows")
    table.add_column("", justify="right")
    for name, number in counts.items():
        table.add_row(escape(name), str(number))
    screen.print(table)
    for label, size in sizes.items():
        if counts.get(label, 0) < size:
            screen.print(
                f"[yellow]Only {counts.get(label, 0)} of the {size} pairs wanted of `{label}`.[/]"
            )
    click.echo(f"Wrote {output}, {output.with_suffix('.manifest.json').name}, dataset_info.json")
