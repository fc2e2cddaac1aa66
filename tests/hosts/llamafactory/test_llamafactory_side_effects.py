"""Every key of LLaMA-Factory's arguments is known to the commands that only look."""

import re
from dataclasses import fields

import pytest

pytest.importorskip("llamafactory")

from llamafactory.hparams import parser

from bdpo_plugin.hosts.llamafactory import side_effects
from bdpo_plugin.hosts.llamafactory.side_effects import DROPPED, OTHERS, SAVES, SHARES, WRITES
from bdpo_plugin.settings import BDPOSettings

#: Names of what leaves a machine, or is left on it.
SMELL = re.compile(r"hub_(?!token)|push|report|swanlab|trackio|profil|ray_|export|tokenized_path")


def test_every_key_is_in_one_list():
    known = {field.name for group in parser._TRAIN_ARGS for field in fields(group) if field.init}
    assert known - set(BDPOSettings.keys()) == side_effects.KEYS
    groups = (DROPPED, SAVES, SHARES, OTHERS, WRITES)
    assert sum(len(group) for group in groups) == len(side_effects.KEYS)
    assert not [key for key in OTHERS if SMELL.search(key)]


def test_a_configuration_without_side_effects(tmp_path):
    keys = dict.fromkeys(side_effects.KEYS, "x") | {"bdpo_alpha": 1.0, "nonesuch": 1}
    there = tmp_path / "tokenised"
    keys["tokenized_path"] = str(there)
    forced = {"report_to", "overwrite_output_dir"}
    kept = side_effects.without_side_effects(keys, tmp_path)
    assert kept.keys() == (keys.keys() - DROPPED - {"tokenized_path"}) | forced
    assert kept["output_dir"] == str(tmp_path / "run")
    there.mkdir()
    assert "tokenized_path" not in side_effects.without_side_effects(keys, tmp_path)
    (there / "dataset_dict.json").touch()
    assert side_effects.without_side_effects(keys, tmp_path)["tokenized_path"] == str(there)
    assert side_effects.without_side_effects({}, tmp_path)["report_to"] == "none"
