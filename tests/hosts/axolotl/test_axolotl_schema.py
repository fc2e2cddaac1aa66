"""The keys that Axolotl knows are those that come through its own validation."""

import pytest

pytest.importorskip("axolotl")

from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from bdpo_plugin.hosts.axolotl.schema import dropped_keys

ENTRY = {"path": "./pairs.jsonl", "type": "chat_template.default"}
#: Keys of a configuration, and which of them Axolotl drops.
CASES = {
    "entry": (
        {"datasets": [{**ENTRY, "split": "train"}, {**ENTRY, "roles": {"user": ["human"]}}]},
        ["datasets[1].roles"],
    ),
    "entry with a typing error": (
        {"datasets": [{**ENTRY, "field_mesages": "x", "field_messages": "y"}]},
        ["datasets[0].field_mesages"],
    ),
    "type of an entry": (
        {"datasets": [{"path": "x", "type": {"field_prompt": "q", "format": "{q}"}}]},
        ["datasets[0].type.format"],
    ),
    "nested": ({"trl": {"beta": 0.1, "loss": "x"}}, ["trl.loss"]),
    "twice nested": (
        {"peft": {"loftq_config": {"loftq_bits": 4, "x": 1}}},
        ["peft.loftq_config.x"],
    ),
    "list of mappings": (
        {"lr_groups": [{"name": "a", "modules": ["x"], "lr": 1e-5, "decay": 0.1}]},
        ["lr_groups[0].decay"],
    ),
    "a mapping of any keys": ({"deepspeed": {"any": {"key": 1}}, "optim_args": {"x": 1}}, []),
    "by another name": ({"model_config": {"x": 1}, "model_type": "AutoModelForCausalLM"}, []),
    "without its prefix": (
        {"fsdp_config": {"fsdp_offload_params": True, "version": 2, "shard": 1}, "adapter": None},
        ["fsdp_config.shard"],
    ),
    "tokens": ({"special_tokens": {"pad_token": "x", "eot": "y"}}, ["special_tokens.eot"]),
    "whole": ({"lora_dropuot": 0.1, "lora_dropout": 0.1}, ["lora_dropuot"]),
    "for YAML's anchors": ({"_entry": {"path": "x"}}, []),
    "left out": ({"nothing": None, "datasets": [{**ENTRY, "roles": None}]}, []),
}


def value(config, place):
    """What is in a validated configuration at a place, None where nothing is."""
    for part in place.replace("[", ".").replace("]", "").split("."):
        config = config[int(part)] if part.isdigit() else (config or {}).get(part)
    return config


@pytest.mark.parametrize("case", CASES)
def test_dropped_is_what_does_not_come_through(case, config) -> None:
    keys, places = CASES[case]
    raw = config(rl="dpo", plugins=None, **keys)
    found = dropped_keys(raw.to_dict())
    expected = [*places, "datasets[0].ds_type"] if "datasets" not in keys else places
    assert sorted(each.place for each in found) == sorted(expected)
    kept = validate_config(DictDefault(raw.to_dict())).to_dict()
    for each in found:
        assert value(kept, each.place) is None
        assert each.path[-1] not in each.known


def test_other_methods_keep_other_keys(config) -> None:
    entry = {"path": "x", "type": "chat_template", "roles": {"user": ["human"]}, "ds_type": "json"}
    assert dropped_keys({"rl": "orpo", "datasets": [entry]}) == []
    assert [each.place for each in dropped_keys({"rl": "bdpo", "datasets": [entry]})] == [
        "datasets[0].roles",
        "datasets[0].ds_type",
    ]


def test_evaluation_sets(config) -> None:
    """Axolotl keeps more of them, of which it reads no more than how to load them."""
    entry = {**ENTRY, "ds_type": "json", "chat_template": "chatml"}
    raw = config(rl="dpo", plugins=None, test_datasets=[entry])
    places = [each.place for each in dropped_keys(raw.to_dict())]
    assert places == ["datasets[0].ds_type", "test_datasets[0].chat_template"]
    kept = validate_config(raw).test_datasets[0]
    assert kept.ds_type == "json"


def test_our_own_keys_are_known(config) -> None:
    raw = config(bdpo_alpha=1.0, bdpo_recipe={"title": "x"}, bdpo=True, datasets=[ENTRY])
    assert dropped_keys(raw.to_dict()) == []
