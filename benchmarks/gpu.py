"""``python -m benchmarks.gpu``: what the owner of one GPU would want to see, in ten minutes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.runs import METHODS, Runs, json_option, make_runs, progress, save
from benchmarks.setting import PRESETS, Setting

_QWEN = PRESETS["gpu-7b"]
#: Shapes of Qwen2.5 and Qwen2, with random weights; pairs so that a run takes some seconds.
SIZES: dict[str, dict[str, Any]] = {
    "7B": _QWEN | {"pairs": 24},
    "1.5B": _QWEN
    | {"hidden": 1536, "intermediate": 8960, "heads": 12, "kv_heads": 2, "vocabulary": 151936}
    | {"tied": True, "pairs": 64},
    "0.5B": _QWEN
    | {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2}
    | {"vocabulary": 151936, "tied": True, "pairs": 128},
}
#: In the order in which they are run, as far as the time allows.
ROWS = (
    ("7B", "lora", "sdpa"),
    ("7B", "lora", "flash_attention_2"),
    ("7B", "qlora", "sdpa"),
    ("1.5B", "lora", "sdpa"),
    ("0.5B", "lora", "sdpa"),
    ("7B", "qlora", "flash_attention_2"),
)
RATIOS = (("B-DPO", "DPO"), ("B-DPO, warm", "DPO"), ("B-DPO", "DPO, precomputed"))
_NEEDS = {"flash_attention_2": "flash_attn", "qlora": "bitsandbytes"}


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="No run begins after so many.")
@click.option("--only", help="Sizes, with commas between.  [default: all]")
@click.option("--pairs", type=click.IntRange(min=2), help="[default: of each size its own]")
@click.option(
    "--layers", type=click.IntRange(min=1), help="[default: of each size its own; for a try]"
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@json_option
def main(
    minutes: float,
    only: str | None,
    pairs: int | None,
    layers: int | None,
    device: str,
    json_file: Path | None,
) -> None:
    """One epoch of TRL's DPO trainer and of ours, for three sizes of Qwen2 with random weights,
    LoRA and QLoRA, SDPA and flash-attention, and the table of it in Markdown.

    A row whose package is not installed, or for which no time is left, is named below the table.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("There is no GPU: --device cpu, with --layers 1, tries it out.")
    changes = {"device": device} | {k: v for k, v in (("pairs", pairs), ("layers", layers)) if v}
    chosen = only.split(",") if only else list(SIZES)
    if unknown := set(chosen) - SIZES.keys():
        raise click.BadParameter(f"{', '.join(unknown)}: {', '.join(SIZES)} are there")
    rows = [row for row in ROWS if row[0] in chosen]
    ends, results, left, machine = time.monotonic() + 60 * minutes, {}, [], {}
    with progress(len(rows) * len(METHODS)) as show:
        for size, adapter, attention in rows:
            name = f"{size}, {adapter}, {attention}"
            missing = [_NEEDS[p] for p in (adapter, attention) if not _there(_NEEDS.get(p))]
            if missing or time.monotonic() > ends:
                left.append(f"{name}: {'no ' + ', '.join(missing) if missing else 'no time left'}")
                continue
            options = SIZES[size] | {"adapter": adapter, "attention": attention} | changes
            with make_runs(Setting(**options)) as runs:
                machine = runs.machine
                results[name] = {"setting": asdict(runs.setting), "of": _row(runs, name, show)}
    click.echo("\n".join(table(results, machine, left)))
    save(json_file, machine=machine, results=results, left_out=left)


def _there(package: str | None) -> bool:
    return package is None or find_spec(package) is not None


def _row(runs: Runs, name: str, show: Any) -> dict[str, Any]:
    """Method -> its run, or what went wrong in it, such as a GPU that is too small."""
    cache, found = tempfile.mkdtemp(dir=runs.folder), {}
    for title, options in METHODS.items():
        show(f"{name}: {title}")
        ours = {"cache": cache} if options["method"] == "bdpo" else {}
        try:
            found[title] = runs.run(**options, **ours)
        except click.ClickException as error:
            found[title] = {"error": error.message.strip().splitlines()[-1]}
    return found


def table(results: dict[str, Any], machine: dict[str, Any], left: list[str]) -> Iterator[str]:
    """In Markdown: seconds and GiB of each method, and ours to TRL's."""
    if machine:
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        yield f"{machine['gpu'] or machine['cpu']}; Python {machine['python']}, {packages}."
        yield ""
    methods = list(METHODS)
    heads = [f"{name} [s; GiB]" for name in methods]
    heads += [" / ".join(pair) for pair in RATIOS]
    heads.append("pairs an hour, B-DPO")
    yield f"| | {' | '.join(heads)} |"
    yield f"| --- |{' --- |' * len(heads)}"
    for name, row in results.items():
        runs = row["of"]
        cells = [_cell(runs[method]) for method in methods]
        cells += [_ratio(runs.get(ours), runs.get(theirs)) for ours, theirs in RATIOS]
        hours = runs["B-DPO"].get("wall_s", 0) / 3600
        cells.append(f"{row['setting']['pairs'] / hours:.0f}" if hours else "–")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for name, row in results.items():
        for method, run in row["of"].items():
            if "error" in run:
                yield f"- {name}, {method} failed: {run['error']}"
    for what in left:
        yield f"- Left out: {what}"


def _cell(run: dict[str, Any]) -> str:
    return "failed" if "error" in run else f"{run['wall_s']:.3g}; {run['peak_mib'] / 1024:.3g}"


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """Of the times, and of the memories."""
    if not ours or not theirs or "error" in ours or "error" in theirs:
        return "–"
    time_, memory = (ours[key] / theirs[key] for key in ("wall_s", "peak_mib"))
    return f"**{time_:.2f}**; {memory:.2f}"


if __name__ == "__main__":
    main()
