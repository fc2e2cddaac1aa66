"""What a run's configuration and output folder say for its model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from click import ClickException

from bdpo_plugin.output.run_folder import RECORD, evaluations, find_trainer_state
from bdpo_plugin.redact import REDACTED, redacted
from bdpo_plugin.settings import RECIPE

_HUB = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
_FILE = re.compile(r"\.(?:jsonl?|csv|parquet|arrow|txt|gz)$")
_MODEL_KEYS = ("base_model", "model_name_or_path")
#: Key of the log of an evaluation set -> what it is.
METRICS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
}


class DataSet(NamedTuple):
    """A dataset that a configuration names.

    Attributes:
        name: a name on the hub, or the path of a file or folder.
        on_hub: whether it is on the hub.
    """

    name: str
    on_hub: bool


class Facts(NamedTuple):
    """What a model card says of a run.

    Attributes:
        model: the base model, as the configuration or the adapter names it; None if neither does.
        hub_model: the base model's name on the hub, if it is known.
        adapter: whether the folder has an adapter, and not a whole model.
        has_template: whether the model is asked by a chat template.
        trained: the folder or the hub's repository that has the trained model.
        data: the training data.
        command: the command that makes the model or the data, if the recipe names one.
        licence: the licence that the recipe names.
        beta: the beta of the loss.
        evaluations: the last figures of each evaluation set, by its name ("" for the only one).
    """

    model: str | None
    hub_model: str | None
    adapter: bool
    has_template: bool
    trained: str
    data: list[DataSet]
    command: str | None
    licence: str | None
    beta: float | None
    evaluations: dict[str, dict[str, float]]


def read_facts(
    folder: Path,
    configuration: Mapping[str, Any] | None,
    log: Sequence[Mapping[str, Any]] | None = None,
    repo: str | None = None,
) -> Facts:
    """Reads what a model card says of a run, without what must not leave this machine.

    Args:
        log: the log of the trainer; None: the folder's own, or that of its latest checkpoint.
    """
    keys: dict[str, Any] = redacted(dict(configuration or {}))[0]
    about = keys.get(RECIPE)
    about = about if isinstance(about, dict) else {}
    of_data = about.get("data")
    of_data = of_data if isinstance(of_data, dict) else {}
    record = _json(folder / RECORD)
    adapter = _json(folder / "adapter_config.json")
    named = next((str(keys[key]) for key in _MODEL_KEYS if keys.get(key)), None)
    named = named or adapter.get("base_model_name_or_path")
    model = _shown(named)
    hub_model = _shown(about.get("base_model")) or (model if record.get("model_commit") else None)
    data = data_sets(keys)
    if source := _shown(of_data.get("source")):
        data.append(DataSet(source, not is_local(source)))
    last = {name: entries[-1] for name, entries in evaluations(log or _log(folder)).items()}
    return Facts(
        model,
        hub_model,
        (folder / "adapter_config.json").is_file(),
        record.get("chat_template", "") is not None,
        repo or _shown(str(folder), "output_dir") or ".",
        list(dict.fromkeys(data)),
        _shown(of_data.get("command")),
        _shown(about.get("licence")),
        (record.get("loss") or {}).get("beta"),
        {name: {k: v for k, v in of.items() if k in METRICS} for name, of in last.items()},
    )


def data_sets(configuration: Mapping[str, Any]) -> list[DataSet]:
    """Returns the datasets that a configuration of Axolotl, LLaMA-Factory or TRL names.

    For LLaMA-Factory, those are on a hub that dataset_info.json loads from one."""
    lists = [configuration.get(key) for key in ("datasets", "test_datasets")]
    entries = [entry for place in lists if isinstance(place, list) for entry in place]
    names = [name for entry in entries if isinstance(entry, dict) for name in _of_entry(entry)]
    if configuration.get("dataset_name"):
        names.append(str(configuration["dataset_name"]))
    if names or "model_name_or_path" not in configuration:
        return [DataSet(name, not is_local(name) or "://" in name) for name in names]
    folder = Path(str(configuration.get("dataset_dir", "data")))
    info = _json(folder / "dataset_info.json")
    named = ",".join(str(configuration.get(key) or "") for key in ("dataset", "eval_dataset"))
    found = []
    for name in (part.strip() for part in named.split(",") if part.strip()):
        entry = info[name] if isinstance(info.get(name), dict) else {}
        hubs = [entry[key] for key in _HUBS if key in entry]
        file = (folder / str(entry.get("file_name", name))).as_posix()
        found.append(DataSet(str(hubs[0]), True) if hubs else DataSet(file, False))
    return found


def _of_entry(entry: Mapping[str, Any]) -> list[str]:
    """Returns the data of an entry of `datasets`: its path, or the files that it reads."""
    files = entry.get("data_files")
    if files and entry.get("path") in (None, *READERS):
        return [str(file) for file in (files if isinstance(files, list) else [files])]
    return [str(entry.get("path"))]


#: Paths of entries of `datasets` that name a reader of files.
READERS = ("json", "csv", "parquet", "text")
#: Keys of an entry of dataset_info.json that name data elsewhere.
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name")


def is_local(name: str) -> bool:
    """Whether the name of a model or dataset is a path, not a name on the hub."""
    return not _HUB.fullmatch(name) or bool(_FILE.search(name)) or Path(name).exists()


def _shown(text: object, key: str = "base_model") -> str | None:
    """Returns a text as others may see it; None if there is nothing that they may see."""
    if not isinstance(text, str) or not text:
        return None
    shown: str = redacted({key: text})[0][key]
    return None if shown == REDACTED else shown


def _log(folder: Path) -> Iterable[Mapping[str, Any]]:
    """Returns the log of a run; empty if there is none, as a card must never end a run."""
    try:
        log: list[Mapping[str, Any]] = _json(find_trainer_state(folder)).get("log_history", [])
    except (ClickException, OSError, ValueError, KeyError):
        return []
    return log


def _json(path: Path) -> dict[str, Any]:
    """Reads a mapping from a JSON file; empty if there is none, as a card must never end a run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
