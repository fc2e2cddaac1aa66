"""Axolotl itself, with a configuration small enough to read."""

import json
from pathlib import Path

import pytest

#: A DPO run as a user writes it; its model does not exist, so whoever loads it fails otherwise.
DPO = {
    "base_model": "./no-such-model",
    "datasets": [{"path": "./pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}],
    "sequence_len": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "bf16": False,
    "tf32": False,
    "chat_template": "tokenizer_default",
    "dataset_num_proc": 1,
    "output_dir": "./out",
}


@pytest.fixture
def config(tmp_path):
    """Makes a raw B-DPO configuration; a key of None is left out."""

    from axolotl.utils.dict import DictDefault

    def make(**keys) -> DictDefault:
        ours = {"rl": "bdpo", "plugins": ["bdpo_plugin.BDPOPlugin"]}
        places = {
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
        }
        merged = DPO | places | ours | keys
        return DictDefault({key: value for key, value in merged.items() if value is not None})

    return make


@pytest.fixture(autouse=True)
def _no_plugins_of_other_tests():
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()


@pytest.fixture
def tiny(tmp_path):
    """Keys of a model and a dataset that do exist."""
    from bdpo_plugin.demo.tiny import write

    write(tmp_path, steps=0, train_pairs=4, eval_pairs=2, progress=False, hidden_size=32, layers=1)
    dataset = {
        "path": str(tmp_path / "train.jsonl"),
        "ds_type": "json",
        "type": "chat_template.default",
    }
    return {"base_model": str(tmp_path / "model"), "datasets": [dataset]}


@pytest.fixture
def loaded(tiny, config, tmp_path):
    """Loads data and returns what Axolotl makes of it, in the order of the rows.

    Rows of None leave the file as it is; `entry` changes the entry of `datasets`.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets

    def load(rows=None, type="chat_template.default", entry=None, **changes):
        (given,) = tiny["datasets"]
        if rows is not None:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(given["path"]).write_text(lines, encoding="utf-8")
        keys = {**tiny, "datasets": [{**given, "type": type, **(entry or {})}]}
        keys |= {"shuffle_merged_datasets": False, **changes}
        return load_preference_datasets(cfg=load_cfg(config(**keys))).train_dataset

    return load


@pytest.fixture
def refusal(loaded):
    """Loads data and returns what B-DPO says of it."""
    from bdpo_plugin.settings import BDPOError

    def load(*args, **kwargs):
        with pytest.raises(BDPOError) as raised:
            loaded(*args, **kwargs)
        return str(raised.value)

    return load
