"""``python -m benchmarks.reference_pass``: our pass over the data beside TRL's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.runs import comparison, console, describe, json_option, make_runs, progress, save
from benchmarks.setting import setting_options, take_setting

TRL = "TRL"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    TRL: ("dpo", {"precompute_ref_log_probs": True}),
    "pointwise": ("bdpo", {}),
    "expected": ("bdpo", {"bdpo_mi_estimator": "expected"}),
}
MEASURES = {
    "pass_s": "time of the pass [s]",
    "peak_mib": "peak memory [MiB]",
    "peak_over_load_mib": "  beyond model and data [MiB]",
}


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Runs of each, alternating.")
@json_option
@setting_options
def main(repeats: int, json_file: Path | None, **options: Any) -> None:
    """The reference's pass over the data: ours, which also computes the mutual information, and
    that of TRL's precompute_ref_log_probs, on the same model and data."""
    setting = take_setting(options)
    if setting.host == "llamafactory":
        raise click.UsageError("--host llamafactory: it has no pass of its own to compare with.")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    with make_runs(setting) as runs, progress(repeats * len(METHODS)) as show:
        for turn in range(repeats):
            for name, (method, arguments) in METHODS.items():
                show(f"{name}, run {turn + 1} of {repeats}")
                results[name].append(runs.run(method, train=False, **arguments))
    screen = console()
    title = f"The reference pass, TRL's without MI, {setting.device}, adapter {setting.adapter}"
    screen.print(comparison(title, results, MEASURES, TRL))
    screen.print(describe(setting, runs.machine), highlight=False)
    save(json_file, setting=asdict(setting), machine=runs.machine, results=results)


if __name__ == "__main__":
    main()
