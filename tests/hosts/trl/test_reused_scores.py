"""A run takes the stored scores of its own reference alone, and its record says what it took."""

import copy
import json
import math

import pytest
import torch
from running import history, pairs, sharp_model, trainer
from transformers import Gemma2Config

from bdpo_plugin.demo.tiny import build_tokenizer

DATA = pairs(12)


def run(folder, name, model, **options):
    """The first step of a training on a model, the reference being the same: its margin is 0."""
    made = trainer(
        output_dir=folder / name,
        model=model,
        dataset=DATA,
        bdpo_alpha=0,
        max_steps=1,
        bdpo_cache_dir=str(folder / "scores"),
        **options,
    )
    made.train()
    (margin,) = history(made, "rewards/margins")
    (loss,) = history(made, "loss")
    assert margin == pytest.approx(0, abs=1e-4)
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    return json.loads((folder / name / "bdpo" / "run.json").read_text())["scores"]


def test_the_record_says_what_was_reused(tmp_path, capsys):
    first = run(tmp_path, "first", sharp_model(), evaluation={"small": pairs(4, seed=5)})
    again = run(tmp_path, "again", sharp_model(), evaluation={"small": pairs(4, seed=5)})
    assert first["pairs"]["train"] == {"scored now": 12, "reused": 0}
    assert again["pairs"]["train"] == {"scored now": 0, "reused": 12}
    assert again["pairs"]["small"] == {"scored now": 0, "reused": 4}
    assert first["identity"] == again["identity"]
    assert first["verified"] == {
        "scores": 0,
        "beyond rounding": 0,
        "greatest difference": 0.0,
    }
    verified = again["verified"]
    assert 1 <= verified["scores"] <= 16
    assert verified["beyond rounding"] == 0
    assert verified["greatest difference"] < 1e-3
    assert len(list((tmp_path / "scores").rglob("*.parquet"))) == 1, "one file in the end"
    assert "stored scores" not in capsys.readouterr().out


def test_where_each_batch_is_scored_in_its_step_nothing_is_reused(tmp_path):
    assert run(tmp_path, "run", sharp_model(), bdpo_precompute=False) is None


def test_another_attention_is_another_reference(tmp_path):
    """Gemma 2 leaves out its soft cap under `sdpa`."""
    model = sharp_model(
        config=Gemma2Config,
        hidden_size=64,
        layers=2,
        query_pre_attn_scalar=16,
        sliding_window=512,
        attn_logit_softcapping=50.0,
    )
    if model.config._attn_implementation == "eager":
        pytest.skip("this release of transformers has no other attention for it")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(20)
    for attention in ("sdpa", "eager", "sdpa"):
        used = copy.deepcopy(model)
        used.set_attn_implementation(attention)
        found = run(tmp_path, attention, used, lora=False)
        reused = found["pairs"]["train"]["reused"]
    assert reused == len(DATA)
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_a_fake_quantised_model_is_another_reference(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16)
    tokenizer = build_tokenizer()
    for quantised in (True, False):
        model = sharp_model(tokenizer, hidden_size=64)
        if quantised:
            config = qat.QATConfig(weight_config=weights, step="prepare")
            quantization.quantize_(model, config)
        found = run(tmp_path, str(quantised), model, lora=False)
        assert found["pairs"]["train"]["reused"] == 0
