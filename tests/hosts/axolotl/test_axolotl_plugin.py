"""The plugin in Axolotl: a configuration's way to our trainer."""

import gc
import inspect
import sys

import pytest

pytest.importorskip("axolotl")

import torch
from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.core.builders import rl as builders
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.import_helper import get_cls_from_module_str
from axolotl.utils.schemas.enums import RLType
from trl import DPOTrainer

import bdpo_plugin
from bdpo_plugin.hosts import axolotl as host
from bdpo_plugin.hosts.axolotl.limits import TRAINER
from bdpo_plugin.hosts.axolotl.rewrite_config import PLUGIN
from bdpo_plugin.settings import BDPOError, BDPOSettings

CHOSEN = {
    "bdpo_alpha": 0.5,
    "bdpo_weighting": "power",
    "bdpo_balance": False,
    "bdpo_scaling": False,
    "bdpo_mi_estimator": "expected",
    "bdpo_mi_normalize": False,
    "bdpo_null_prompt": "Hello",
    "bdpo_precompute": False,
    "bdpo_score_tokens": 64,
    "bdpo_cache_dir": "scores",
    "bdpo_control": "swapped",
}


def validated(raw: DictDefault) -> DictDefault:
    """A configuration as `load_cfg` leaves it, less what it reads from the model."""
    prepare_plugins(raw)
    return validate_config(raw)


def training_args(cfg: DictDefault) -> dict:
    return PluginManager.get_instance().get_training_args(cfg)


def test_becomes_a_dpo_run_with_our_trainer(config) -> None:
    cfg = validated(config())
    assert cfg.rl is RLType.DPO
    assert cfg.bdpo is True
    assert get_cls_from_module_str(cfg.trainer_cls) is host.AxolotlBDPOTrainer
    assert type(cfg.datasets[0]["type"]) is str  # of the DPO schema, not the SFT one
    assert list(PluginManager.get_instance().plugins) == [PLUGIN] == list(cfg.plugins)


def test_keys_arrive(config) -> None:
    assert list(CHOSEN) == list(BDPOSettings.keys())
    assert training_args(validated(config(**CHOSEN))) == CHOSEN


def test_group_by_length_arrives(config) -> None:
    """Axolotl itself drops it in preference training."""
    arguments = training_args(validated(config(group_by_length=True)))
    assert arguments["train_sampling_strategy"] == "group_by_length"


def test_keys_left_out_are_the_defaults(config) -> None:
    cfg = validated(config(bdpo_alpha=0.5))
    assert [key for key in cfg if key.startswith("bdpo_")] == ["bdpo_alpha"]
    assert training_args(cfg) == BDPOSettings(alpha=0.5).to_keys()


def test_other_runs_are_left_alone(config) -> None:
    before = config(rl="dpo")
    cfg = validated(config(rl="dpo"))
    assert cfg.rl is RLType.DPO
    assert [key for key in cfg if key.startswith("bdpo")] == []
    assert cfg.trainer_cls is None
    assert training_args(cfg) == {}
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    plugin.pre_model_load(cfg)
    plugin.post_trainer_create(cfg, object.__new__(AxolotlDPOTrainer))
    plugin.register(again := config(rl="dpo"))
    assert again == before


def test_validates_again(config) -> None:
    """As a Ray worker does with the parsed configuration."""
    once = validated(config(bdpo_alpha=0.5, precompute_ref_log_probs=True))
    twice = validated(DictDefault(once.to_dict()))
    assert twice.to_dict() == once.to_dict()


def test_command_line_values_arrive(config, tiny) -> None:
    """`python -m axolotl.cli.train cfg.yml --bdpo-alpha=0.5`, as `axolotl train` starts it."""
    cfg = load_cfg(config(**tiny, bdpo_alpha=2.0), bdpo_alpha="0.5", bdpo_balance="false")
    assert training_args(cfg) == BDPOSettings(alpha=0.5, balance=False).to_keys()


def test_inference_with_the_same_configuration(config, tiny) -> None:
    """`axolotl inference` takes `rl` away."""
    cfg = load_cfg(config(**tiny, bdpo_alpha=0.5), inference=True, rl=None)
    assert cfg.rl is None
    assert cfg.trainer_cls is None


def test_merge_lora_with_the_same_configuration(config, tiny) -> None:
    cfg = load_cfg(config(**tiny, adapter="lora", lora_r=2, lora_alpha=2), merge_lora=True)
    PluginManager.get_instance().pre_model_load(cfg)


@pytest.mark.parametrize(
    ("missing", "name"),
    [("plugin", "BDPOPlugin"), ("trainer", "AxolotlBDPOConfig")],
)
def test_import_that_fails(missing, name, config, monkeypatch) -> None:
    """Axolotl itself would log an ImportError and go on."""
    for loaded in host._PUBLIC:
        monkeypatch.delitem(vars(host), loaded, raising=False)
        monkeypatch.delitem(vars(bdpo_plugin), loaded, raising=False)
    monkeypatch.setitem(sys.modules, f"bdpo_plugin.hosts.axolotl.{missing}", None)
    with pytest.raises(BDPOError) as refusal:
        load_cfg(config())
    message = str(refusal.value)
    assert f"B-DPO's {name} for Axolotl could not be imported: import of bdpo_plugin" in message
    assert "Nothing has been trained" in message
    assert "pip install 'bdpo-plugin[axolotl]'" in message


@pytest.mark.parametrize("keys", [{"rl": "ipo"}, {"trainer_cls": "my.Trainer"}])
def test_changed_after_validation(keys, config) -> None:
    cfg = validated(config())
    manager = PluginManager.get_instance()
    manager.pre_model_load(cfg)
    cfg.update(keys)
    ((key, value),) = keys.items()
    with pytest.raises(BDPOError, match=f"but `{key}: {value}` would not train it"):
        manager.pre_model_load(cfg)


class RivalPlugin(BasePlugin):
    def get_trainer_cls(self, cfg):
        return AxolotlDPOTrainer


def test_trainer_of_another_plugin(config) -> None:
    cfg = validated(config(plugins=[PLUGIN, f"{__name__}.RivalPlugin"]))
    with pytest.raises(BDPOError) as refusal:
        PluginManager.get_instance().pre_model_load(cfg)
    assert "brings its own trainer, AxolotlDPOTrainer" in str(refusal.value)
    assert "RivalPlugin" in str(refusal.value)


def test_trainer_that_is_not_ours(config) -> None:
    cfg = validated(config())
    with pytest.raises(BDPOError) as refusal:
        PluginManager.get_instance().post_trainer_create(cfg, object.__new__(AxolotlDPOTrainer))
    assert "asked for B-DPO, but Axolotl made a AxolotlDPOTrainer" in str(refusal.value)
    assert "Nothing has been trained" in str(refusal.value)


def test_trainer_gets_what_axolotl_gives_its_own(config, tmp_path) -> None:
    local = {"path": str(tmp_path), "type": "chat_template.default"}
    cfg = validated(config(datasets=[{"path": "a/b", "type": "chat_template.default"}, local]))
    trainer = object.__new__(host.AxolotlBDPOTrainer)
    PluginManager.get_instance().post_trainer_create(cfg, trainer)
    assert trainer.dataset_tags == ["a/b"]
    assert trainer.tag_names == ["axolotl", "dpo", "bdpo"]
    # the builder asks for this name and would pass the tokenizer under it
    assert "tokenizer" not in inspect.signature(host.AxolotlBDPOTrainer).parameters


def test_step_collects_no_garbage(monkeypatch) -> None:
    monkeypatch.setattr(DPOTrainer, "training_step", lambda *_: torch.tensor(3.0))
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    trainer = object.__new__(host.AxolotlBDPOTrainer)
    assert trainer.training_step(None, {}, None) == 3
    assert collected == []
    assert object.__new__(AxolotlDPOTrainer).training_step(None, {}, None) == 3
    assert collected == [1]


def test_training_arguments_composed_without_us(config, monkeypatch) -> None:
    """A process that built a plain DPO run first has arguments without our fields."""

    class Composed:
        pass

    monkeypatch.setattr(builders, "AxolotlDPOConfig", Composed)
    validated(config(rl="dpo"))
    assert builders.AxolotlDPOConfig is Composed
    validated(config())
    assert builders.AxolotlDPOConfig is host.AxolotlBDPOConfig
    assert host.AxolotlBDPOConfig(output_dir="x", bf16=False, **CHOSEN).bdpo_alpha == 0.5


def test_trainer_name_is_the_class() -> None:
    assert f"{host.__name__}.{host.AxolotlBDPOTrainer.__name__}" == TRAINER
