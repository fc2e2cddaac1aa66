"""Reads the numbers that a run left on disk, to write them to a recipe or compare them with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent
from typing import Any

import click
import yaml

from bdpo_plugin.output.run_folder import RECORD, read_run
from bdpo_plugin.recipes.recipe_file import Recipe, read_recipe
from bdpo_plugin.redact import digest_of
from bdpo_plugin.settings import UNIMPORTANT

#: Number of first steps whose losses a recipe records, and that a run to compare with it takes.
STEPS = 10
#: Tolerances of the mutual information, in its unit, and of the loss, for differences from rounding
#: and kernels. The second ones are for 16-bit training and quantized weights.
TOLERANCES = ({"mi": 0.001, "loss": 0.003}, {"mi": 0.02, "loss": 0.05})
#: The quantiles of the mutual information that a recipe records.
QUANTILES = (0.05, 0.5, 0.95)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads ``bdpo/run.json`` of a run.

    Raises:
        click.ClickException: it does not exist or cannot be read.
    """
    path = folder / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.ClickException(
            f"{path} cannot be read ({error}): give the output folder of a run of B-DPO, by this "
            "release or a newer one"
        ) from error
    return record


def recipe_of(folder: Path) -> Recipe:
    """Reads the configuration that a run was started with.

    Raises:
        click.ClickException: the run was started by a script.
    """
    path = folder / "bdpo" / "recipe.yml"
    if not path.is_file():
        raise click.ClickException(
            f"{folder} is of a run that no YAML started (a script of TRL's, say): share the script"
        )
    return read_recipe(path, str(path))


def expected_of(folder: Path, *, texts: bool = False) -> dict[str, Any]:
    """Returns the settings and results of a run, in the form of `expected` in `bdpo_recipe`.

    Args:
        folder: the output folder of the run.
        texts: whether to include the text of the null prompt instead of its digest.
    """
    record = read_record(folder)
    run = read_run(folder, folder.name)
    logged = {entry["step"]: entry["loss"] for entry in run.log if "loss" in entry}
    first = [step for step in logged if step <= STEPS] or [min(logged)]
    coarse = record["quantised"] or record["mixed_precision"] in ("bf16", "fp16")
    coarse = coarse or record["dtype"] in ("bfloat16", "float16")
    settings = record["settings"].items()
    null_prompt = record["null_prompt"]["text"]
    expected = {
        "seed": record["seed"],
        "settings": {k: v for k, v in settings if k not in UNIMPORTANT and v is not None},
        "pairs": record["pairs"],
        "rows": record["rows"],
        "chat_template": record["chat_template"],
        "null_prompt": null_prompt if texts else digest_of(null_prompt),
        "model_digest": _weights(record),
    }
    if run.scores is not None and run.measured:
        for side in ("mi_chosen", "mi_rejected"):
            expected[side] = rounded_quantiles(run.scores[side].to_pylist())
    expected["losses"] = {step: round(logged[step], 5) for step in first}
    expected["tolerance"] = dict(TOLERANCES[coarse])
    return {key: value for key, value in expected.items() if value is not None}


def rounded_quantiles(values: list[float], parts: Iterable[float] = QUANTILES) -> list[float]:
    """Returns quantiles of values, as the table of a run has them, with five decimal places."""
    import torch

    from bdpo_plugin.output.score_file import quantiles

    return [round(value, 5) for value in quantiles(torch.tensor(values), *parts)]


def _weights(record: dict[str, Any]) -> str | None:
    """Returns the digest of the reference model's weights, if they were read and are in one part.

    The parts that several processes hold have other digests with another number of processes."""
    identity = (record.get("scores") or {}).get("identity") or {}
    found = identity.get("reference") or []  # of each part, and of the tokenizer
    return str(found[0]) if len(found) == 2 else None


def hardware_of(folder: Path) -> str:
    """Returns the hardware of a run in words: the number of processes and the device of each."""
    record = read_record(folder)
    return f"{record['batch']['processes']} x {record['hardware']}"


def measured_of(folder: Path) -> dict[str, Any]:
    """Returns the hardware of a run and, if it has ended, its time and peak memory.

    A run that resumed from a checkpoint has no time, as only its last part was measured."""
    record = read_record(folder)
    measured: dict[str, Any] = {"hardware": hardware_of(folder)}
    if "train_runtime" in record:
        measured["minutes"] = float(f"{record['train_runtime'] / 60:.2g}")
    if "train_peak_memory_gib" in record:
        measured["memory_gib"] = round(record["train_peak_memory_gib"], 1)
    return measured


def dump(value: Any) -> str:
    """Formats a value as YAML in one line, for a message."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("\n...").strip()


def yaml_lines(value: Any) -> str:
    """Formats a value as lines of YAML, indented as below `bdpo_recipe`."""
    return indent(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), "  ")
