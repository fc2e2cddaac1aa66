"""A run as it lies on disk: its log, and the scores of its pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    import pyarrow

#: Where a B-DPO run leaves the scores of its training pairs, in its output folder.
SCORES = Path("bdpo", "reference_scores.parquet")


class Run(NamedTuple):
    """One finished run as it lies on disk."""

    name: str
    log: list[dict[str, Any]]
    scores: pyarrow.Table | None


def read_run(directory: Path, name: str) -> Run:
    """The log and, of a B-DPO run, the reference scores of an output folder.

    Raises:
        click.ClickException: the run left no log, or a log without one training step.
    """
    log = json.loads(find_trainer_state(directory).read_text(encoding="utf-8"))["log_history"]
    if not any("loss" in entry for entry in log):
        raise click.ClickException(f"{directory} has logged no training step: set logging_steps: 1")
    scores = None
    if (directory / SCORES).is_file():
        import pyarrow.parquet

        scores = pyarrow.parquet.read_table(directory / SCORES)
    return Run(name, log, scores)


def find_trainer_state(directory: Path) -> Path:
    """The ``trainer_state.json`` of the latest step: the run's own, or its last checkpoint's."""

    def step(path: Path) -> int:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])

    found = [*directory.glob("checkpoint-*/trainer_state.json")]
    found += [*directory.glob("trainer_state.json")]
    if not found:
        raise click.ClickException(
            f"{directory} has no trainer_state.json, nor has any checkpoint-* in it. "
            "The log of a run is saved with its checkpoints: give the run's output_dir, and let "
            "the run save at least one (saves_per_epoch: 1)"
        )
    return max(found, key=step)


def named(directories: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """Each folder with its name in a picture: its own, after its parent's if two have the same."""
    resolved = [directory.resolve() for directory in directories]
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in resolved]
    return list(zip(directories, names, strict=True))


def load_figures() -> Any:
    """The module of the pictures, or a :class:`click.ClickException` that says what is missing."""
    try:
        from bdpo_plugin.cli import figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise click.ClickException(
            "matplotlib is not installed: pip install 'bdpo-plugin[plot]'"
        ) from error
    return figures
