"""As much of the folder of a run as a bundle is made of, without a run."""

from __future__ import annotations

import json
from pathlib import Path

from bdpo_plugin import BDPOSettings
from bdpo_plugin.redact import digest_of

NULL_PROMPT = "<s>You are zebra.\n"


def recorded_run(folder: Path, recipe: str = "") -> Path:
    """The folder, with the files of a run of Axolotl and the text of its recipe."""
    (folder / "bdpo").mkdir(parents=True)
    record = {
        "host": "axolotl",
        "seed": 1,
        "settings": BDPOSettings().to_keys(),
        "pairs": 2,
        "rows": digest_of("rows"),
        "chat_template": digest_of("template"),
        "null_prompt": {"text": NULL_PROMPT, "source": "chat template"},
        "batch": {"processes": 1, "effective": 2},
        "hardware": "CPU",
        "quantised": False,
        "mixed_precision": "no",
        "dtype": "float32",
        "versions": {"torch": "2.13.0+cpu"},
    }
    (folder / "bdpo" / "run.json").write_text(json.dumps(record))
    (folder / "bdpo" / "recipe.yml").write_text(recipe, encoding="utf-8")
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 0.6931}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
