"""Reads a run's output folder: its log, the scores of its pairs and its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bdpo_plugin.settings import RECIPE

if TYPE_CHECKING:
    import pyarrow

#: The file with the scores of a B-DPO run's training pairs, in its output folder.
SCORES = Path("bdpo", "reference_scores.parquet")
#: The file with the record of a B-DPO run.
RECORD = Path("bdpo", "run.json")
#: Figures of a run as a whole. They are in its last log entry or in the record.
ENDED = ("train_runtime", "train_peak_memory_gib")


#: A key that transformers logs once per evaluation.
_EVALUATION = re.compile(r"eval_(?:(?P<name>.+)_)?runtime")


class Run(NamedTuple):
    """One finished run, as its output folder has it.

    Attributes:
        name: a short name, for people.
        log: the entries of the trainer's log.
        scores: the scores of the training pairs, of a B-DPO run.
        settings: the settings by where they are from: the trainer's state, the adapter, the record
            of a B-DPO run, or the configuration of a host. Within one of these, a setting that is
            missing was not set.
    """

    name: str
    log: list[dict[str, Any]]
    scores: pyarrow.Table | None
    settings: dict[str, dict[str, Any]]

    @property
    def measured(self) -> bool:
        """Whether there are scores with the mutual information. If not, all weights are 1."""
        return self.scores is not None and "mi_chosen" in self.scores.column_names


def named(directories: Sequence[Path]) -> list[tuple[Path, str]]:
    """Returns each folder with a short name, which includes its parent if two names are equal."""
    resolved = [directory.resolve() for directory in directories]
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in resolved]
    return list(zip(directories, names, strict=True))


def read_run(directory: Path, name: str) -> Run:
    """Reads the log of an output folder, the settings and, for a B-DPO run, the scores.

    Raises:
        click.ClickException: there is no log, it has no training step, or a file cannot be read.
    """
    found = find_trainer_state(directory)
    state = json.loads(found.read_text(encoding="utf-8"))
    log = state["log_history"]
    if not any("loss" in entry for entry in log):
        raise click.ClickException(f"{directory} has logged no training step: set logging_steps: 1")
    if (directory / RECORD).is_file() and not any("train_runtime" in entry for entry in log):
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        ended = {name: record[name] for name in ENDED if name in record}
        log.append({"step": max(entry["step"] for entry in log), **ended})
    scores = None
    if (directory / SCORES).is_file():
        import pyarrow.parquet

        scores = pyarrow.parquet.read_table(directory / SCORES)
    settings = {TRAINER: {key: state.get(key) for key in _OF_THE_TRAINER}}
    return Run(name, log, scores, settings | _settings(directory, found.parent))


def evaluations(log: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the log entries of each evaluation set, by its name ("" for the only one).

    The figures get the names that they have in training. A trainer with several evaluation sets
    writes the name of the set into some keys of its log (`eval_NAME_loss`), but not into those of
    the rewards.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in log:
        if not any(key.startswith("eval_") for key in entry):
            continue
        times = [match for key in entry if (match := _EVALUATION.fullmatch(key))]
        name = times[0]["name"] or "" if times else ""
        figures = {"step": entry["step"]}
        for before in ("eval_", f"eval_{name}_"):
            known = entry.items()
            figures |= {k.removeprefix(before): v for k, v in known if k.startswith(before)}
        found.setdefault(name, []).append(figures)
    return found


def find_trainer_state(directory: Path) -> Path:
    """Returns the ``trainer_state.json`` of the latest step, the run's own or a checkpoint's.

    Raises:
        click.ClickException: there is none.
    """

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


#: Where a setting is from: the state of transformers' trainer, the adapter, or B-DPO's record. The
#: settings of a configuration are under the name of its host.
TRAINER, ADAPTER, BDPO = "trainer", "adapter", "bdpo"
_OF_THE_TRAINER = ("num_train_epochs", "max_steps", "train_batch_size")
#: What says where a run took place, who started it or how it went, but not what it was to compute.
_OTHER = re.compile(
    r"(^_|_dir$|(?<!or)_path$|run_name|hub_|push_to|local_rank|report_to|token$|key$|secret$|password$"
    r"|^wandb|^mlflow|logging|^parent_library$|^megatron|inference_mode|_version$|^train_runtime$|^train_peak_memory_gib$"
    r"|^layout\.|^scores\.|^computation$|^rows$|^null prompt$|^null_prompt\.source$|^quantised$"
    r"|^bdpo_score_tokens$|^bdpo_precompute$|^auto_mapping|^task_type$|^fan_in_fan_out$)"
)
#: The files with settings of a run. If two of one origin have the same setting, the later decides.
_FILES = {
    "adapter_config.json": ADAPTER,
    "bdpo_run.json": BDPO,
    "bdpo/run.json": BDPO,
    "bdpo/recipe.yml": None,
}


def _settings(directory: Path, saved: Path) -> dict[str, dict[str, Any]]:
    """Reads the settings that a run left as text, by where they are from.

    Paths of folders, names of accounts and tokens are not included, nor is what a configuration
    says of B-DPO once more.

    Args:
        saved: the folder with the latest state: the output folder or one of its checkpoints.
    """
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for file, origin in _FILES.items():
        for folder in (saved, directory):
            path = folder / file
            if not path.is_file():
                continue
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise click.ClickException(f"{path} cannot be read: {error}") from error
            if not isinstance(content, dict):
                continue
            content.pop(RECIPE, None)  # describes the results of another run
            recorded = found.get(BDPO, {})
            flat = {k: v for k, v in _flat(content) if v is not None and not _OTHER.search(k)}
            if origin is None:
                flat = {key: value for key, value in flat.items() if key not in recorded}
            found.setdefault(origin or str(recorded.get("host")), {}).update(flat)
    return found


def _flat(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings with their dotted names.

    The settings of B-DPO keep their own names, as these are unique (``bdpo_...``)."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, "" if name == "settings" else f"{before}{name}.")
        else:
            # PEFT writes this set in arbitrary order
            yield f"{before}{name}", sorted(value) if name == "target_modules" else value
