"""The example configurations, as far as they go without the model they name."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig

from bdpo_plugin.settings import BDPOSettings

FOLDER = Path(__file__).parents[3] / "example_configs" / "axolotl"
RECIPES = [FOLDER / f"{name}.yml" for name in ("lora", "qlora", "full")]

PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(60)
]


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> dict:
    return yaml.safe_load(request.param.read_text())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yml")), ids=lambda path: path.stem)
def test_no_key_is_one_that_axolotl_drops(path) -> None:
    known = {*AxolotlInputConfig.model_fields, *BDPOSettings.keys()}
    assert set(yaml.safe_load(path.read_text())) - known == set()


def test_loads_its_data(recipe, tiny, tmp_path) -> None:
    (tmp_path / "safety-pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    assert recipe["datasets"][0]["path"] == "./data/safety-pairs.jsonl"
    recipe["datasets"][0]["path"] = str(tmp_path / "safety-pairs.jsonl")
    recipe |= {
        "base_model": tiny["base_model"],
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "dataset_num_proc": 1,
    }
    cfg = load_cfg(DictDefault(recipe))
    assert cfg.bdpo is True
    args = PluginManager.get_instance().get_training_args(cfg)
    assert args["bdpo_alpha"] == 1.5
    data = load_preference_datasets(cfg=cfg)
    assert len(data.train_dataset) + len(data.eval_dataset) == 60
    row = data.train_dataset[0]
    number = row["prompt"].split("Question ")[1].split("?")[0]
    assert (
        row["prompt"] == f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row["chosen"] == f"Good {number}.<|im_end|>"
    assert row["rejected"] == f"Bad {number}.<|im_end|>"


def test_adapters_differ() -> None:
    read = [yaml.safe_load(path.read_text()) for path in RECIPES]
    adapters = [(recipe.get("adapter"), recipe.get("load_in_4bit")) for recipe in read]
    assert adapters == [("lora", None), ("qlora", True), (None, None)]
