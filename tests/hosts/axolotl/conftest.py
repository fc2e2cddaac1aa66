"""Axolotl itself, with a configuration small enough to read."""

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
    from bdpo_plugin.tiny import write

    write(tmp_path, steps=0, train_pairs=4, eval_pairs=2, progress=False, hidden_size=32, layers=1)
    dataset = {
        "path": str(tmp_path / "train.jsonl"),
        "ds_type": "json",
        "type": "chat_template.default",
    }
    return {"base_model": str(tmp_path / "model"), "datasets": [dataset]}
