"""``python -m benchmarks.startup``: what a run does before its first forward, on many pairs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks.runs import console, describe, json_option, make_runs, save
from benchmarks.setting import HOST_PART, setting_options, take_setting


@click.command(context_settings={"default_map": {"pairs": 100_000}})
@click.option("--processes", type=int, help="The host's dataset_num_proc.  [default: none]")
@json_option
@setting_options
def main(processes: int | None, json_file: Path | None, **options: Any) -> None:
    """What a run of ours does before the first forward of its reference, beside what the host
    takes in the same run to tokenise the same pairs."""
    setting = take_setting(options)
    key = "preprocessing_num_workers" if setting.host == "llamafactory" else "dataset_num_proc"
    with make_runs(setting) as runs:
        took = runs.parts(until_forward=True, **({key: processes} if processes else {}))
    ours = np.sum([of_part for title, of_part in took.items() if title != HOST_PART], axis=0)
    took |= {"ours, all of it": ours.tolist(), "ours / host": (ours / took[HOST_PART]).tolist()}
    table = Table(title=f"Start-up on {setting.pairs:,} pairs, {setting.host} [s]")
    for column in ("", "wall", "processor"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in took.items():
        if any(times):
            table.add_row(name, *(f"{seconds:.2f}" for seconds in times))
    screen = console()
    screen.print(table)
    screen.print(describe(setting, runs.machine), highlight=False)
    save(json_file, setting=asdict(setting), machine=runs.machine, results=took)


if __name__ == "__main__":
    main()
