"""The rows, as data: ``axolotl.yml`` and ``llamafactory.yml`` beside this file.

Each file has ``base``, the keys of every run, what ``differs`` in all, and ``rows``, by name:

- ``keys``: of the host's configuration; one of null is left out;
- ``model``, ``data``, ``type``: of material.py, and Axolotl's type of dataset (``data: [..]`` are
  several, in LLaMA-Factory mixed);
- ``dtype``: what the run computes in, which says how near the two runs must come (judge.py);
- ``host``, ``ours``: keys of the host's own DPO alone, or of B-DPO alone;
- ``refused``: ``both``, or ``ours`` where B-DPO refuses by its documentation what the host trains;
- ``says``: a part of B-DPO's refusal;
- ``differs``: metrics that are not compared, and why; ``first`` for a first margin that is not 0,
  ``all`` where nothing can be compared;
- ``quick``: it is among the eight of `make test`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent
#: What makes a run DPO, and B-DPO that must be DPO.
METHODS = {
    "axolotl": {"dpo": {"rl": "dpo"}, "bdpo": {"rl": "bdpo", "bdpo_alpha": 0}},
    "llamafactory": {
        "dpo": {"pref_loss": "sigmoid"},
        "bdpo": {"pref_loss": "bdpo", "bdpo_alpha": 0},
    },
}


@dataclass(frozen=True)
class Row:
    """See the module."""

    of: str
    name: str
    base: dict[str, Any] = field(repr=False)
    keys: dict[str, Any] = field(default_factory=dict)
    model: str = "qwen2"
    data: str | list[str] = "messages"
    type: Any = "chat_template.default"
    dtype: str = "float32"
    host: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    says: str = ""
    differs: dict[str, str] = field(default_factory=dict)
    note: str = ""
    quick: bool = False

    def config(self, method: str, material: Path, folder: Path) -> dict[str, Any]:
        """The configuration of one of the two runs, ``dpo`` or ``bdpo``, in its own folder."""
        given = METHODS[self.of][method] | (self.host if method == "dpo" else self.ours)
        data = [self.data] if isinstance(self.data, str) else self.data
        if self.of == "axolotl":
            types = self.type if isinstance(self.type, list) else [self.type] * len(data)

            def dataset(name: str, kind: Any) -> dict[str, Any]:
                kind = kind if isinstance(kind, dict) and "type" in kind else {"type": kind}
                path = str(material / "data" / f"{name}.jsonl")
                return {"path": path, "ds_type": "json", "split": "train", **kind}

            places = {
                "base_model": str(material / "models" / self.model),
                "datasets": [dataset(*pair) for pair in zip(data, types, strict=True)],
                "dataset_prepared_path": str(folder / "prepared"),
                "output_dir": str(folder / "out"),
            }
            if self.keys.get("test_datasets"):
                given["test_datasets"] = [dataset(f"{data[0]}.eval", types[0])]
        else:
            places = {
                "model_name_or_path": str(material / "models" / self.model),
                "dataset_dir": str(material / "data"),
                "dataset": ",".join(data),
                "output_dir": str(folder / "out"),
            }
        merged = self.base | places | self.keys | given
        return {key: value for key, value in merged.items() if value is not None}


def load(host: str) -> list[Row]:
    """All rows of a host, in the order of its file."""
    content = yaml.safe_load((_FOLDER / f"{host}.yml").read_text())
    always = content.get("differs", {})
    rows = {
        name: row | {"differs": always | row.get("differs", {})}
        for name, row in content["rows"].items()
    }
    return [Row(host, name, content["base"], **row) for name, row in rows.items()]
