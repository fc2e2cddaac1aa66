"""The floor is run, and is what it says: each prompt once, and no other token."""

import json
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner

from benchmarks import floor
from benchmarks.material import build_model
from benchmarks.setting import Setting

SMALL = {"hidden": 32, "intermediate": 32, "layers": 1, "heads": 2, "kv_heads": 2}
SMALL |= {"host": "trl", "vocabulary": 120, "pairs": 3, "batch": 2, "response": 9.0}


def test_the_floor_runs_each_prompt_once_and_reads_the_responses():
    setting = Setting(**SMALL)
    model = build_model(setting)
    pairs, null = floor._pairs(setting)
    assert len(null) == 6
    shapes = {}
    for name, layer in (("body", model.model.norm), ("head", model.lm_head)):
        layer.register_forward_pre_hook(
            lambda _, args, name=name: shapes.__setitem__(name, args[0].shape)
        )
    texts = [text for pair in pairs for text in pair]
    loss = floor._floor(model, texts, torch.device("cpu"))
    responses = sum(len(response) for _, response in texts)
    assert shapes["body"][:2] == (1, responses + sum(len(pair[0][0]) for pair in pairs))
    assert shapes["head"][0] == responses
    assert loss.requires_grad


@pytest.mark.skipif(
    bool(find_spec("axolotl")), reason="is the same in every environment: it runs beside TRL alone"
)
@pytest.mark.exhaustive
def test_the_command(tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    file = tmp_path / "floor.json"
    done = CliRunner().invoke(floor.main, [*options, "--repeats", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    times = json.loads(file.read_text())["results"]
    whole, bare = "pass", "pass without the null prompt"
    wanted = {f"{name}: {kind}" for name in ("step", whole, bare) for kind in ("floor", "ours")}
    assert wanted < set(times)
    fixed = times.pop("fixed costs of a pass")
    assert {"pairs checked", "fingerprints", "probe of the model", "the rest"} < set(fixed)
    assert sum(fixed.values()) > 0
    assert "the forwards" not in fixed
    assert all(len(of_one) == 1 and of_one[0] > 0 for of_one in times.values())
