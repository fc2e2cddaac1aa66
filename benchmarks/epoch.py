"""``python -m benchmarks.epoch``: an epoch of the host's DPO trainer beside one of ours."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.runs import (
    METHODS,
    comparison,
    console,
    describe,
    json_option,
    make_runs,
    progress,
    save,
)
from benchmarks.setting import setting_options, take_setting

MEASURES = {
    "wall_s": "wall time, with pass [s]",
    "pass_s": "  of which the pass [s]",
    "cpu_s": "processor time [s]",
    "step_s": "time per step [s]",
    "tokens_per_s": "tokens per second",
    "peak_mib": "peak memory [MiB]",
    "peak_over_load_mib": "  beyond what is loaded [MiB]",
}


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Runs of each, alternating.")
@click.option("--epochs", default=1, show_default=True, help="Of training, in each run.")
@click.option(
    "--precomputed",
    is_flag=True,
    help="The host's DPO once more, with TRL's precompute_ref_log_probs.",
)
@click.option("--warm", is_flag=True, help="Ours once more, with the scores of the first run.")
@click.option("--alpha-0", is_flag=True, help="Ours once more, with `bdpo_alpha: 0`: DPO itself.")
@click.option(
    "--collecting",
    is_flag=True,
    help="Ours once more, with the garbage collection of Axolotl's trainer after each step.",
)
@json_option
@setting_options
def main(
    repeats: int,
    epochs: int,
    precomputed: bool,
    warm: bool,
    alpha_0: bool,
    collecting: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """An epoch, or several, of the host's own DPO trainer and of B-DPO's, in turn; their ratios.

    Model, data, batch, dtype and order are the same, and each run is a new process. B-DPO's
    time includes its pass over the data with the reference model.
    """
    setting = take_setting(options)
    if collecting and setting.host != "axolotl":
        raise click.UsageError("--collecting needs --host axolotl: no other trainer does it")
    if precomputed and setting.host == "llamafactory":
        raise click.UsageError("--precomputed: LLaMA-Factory does not precompute")
    asked = {"DPO, precomputed": precomputed, "B-DPO, warm": warm}
    methods = {name: of_method for name, of_method in METHODS.items() if asked.get(name, True)}
    if alpha_0:
        methods["B-DPO, alpha 0"] = {"method": "bdpo", "bdpo_alpha": 0}
    if collecting:
        methods["B-DPO, collecting"] = {"method": "bdpo-collecting"}
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    with make_runs(setting) as runs, progress(repeats * len(methods)) as show:
        for turn in range(repeats):
            cache = tempfile.mkdtemp(dir=runs.folder)
            for name, of_method in methods.items():
                show(f"{name}, run {turn + 1} of {repeats}")
                ours = of_method["method"] == "bdpo" and "bdpo_alpha" not in of_method
                kept = {"cache": cache} if ours else {}
                results[name].append(runs.run(**of_method, **kept, num_train_epochs=epochs))
    screen = console()
    length = "One epoch" if epochs == 1 else f"{epochs} epochs"
    title = f"{length}, {setting.host}, {setting.device}, adapter {setting.adapter}"
    screen.print(comparison(title, results, MEASURES, "DPO"))
    screen.print(describe(setting, runs.machine), highlight=False)
    save(
        json_file,
        setting=asdict(setting),
        epochs=epochs,
        machine=runs.machine,
        results=results,
    )


if __name__ == "__main__":
    main()
