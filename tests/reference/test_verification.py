"""Reused scores are computed again, some of them: beyond rounding, none of their store is used."""

import contextlib
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CPU, counted_rows, random_pairs, recast, small_model, stored
from torch import nn
from transformers import Qwen2Model

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference import verification
from bdpo_plugin.reference.fingerprint import model_fingerprint
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.score_pairs import score_dataset, score_pairs
from bdpo_plugin.reference.scoring import ScoreRequest
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.reference.verification import SCORES, rounding
from bdpo_plugin.settings import BDPOSettings

PAIRS = random_pairs(10, seed=3, response=(2, 40))
NULL = NullPrompt((7, 8, 9), "", "")


@pytest.fixture(autouse=True)
def _however_slow_the_machine(monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", math.inf)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


class Run:
    """A run of its own on one folder: its scores, its store and what the user was shown."""

    def __init__(self, folder, model, *, autocast=contextlib.nullcontext, **settings):
        self.shown = []
        self.store = ScoreStore(folder, ["model", "tokenizer"], self.shown.append)
        reference = Reference(model, "itself", autocast=autocast)
        settings = BDPOSettings(**{"score_tokens": 1000, **settings})
        run = {"reader": ResponseReader(), "device": CPU}
        score_pairs(PAIRS[:1], reference, NULL, settings, **run)  # the reader has met the model
        with counted_rows(model) as rows:
            self.scores = score_dataset(PAIRS, reference, NULL, settings, **run, store=self.store)
        self.rows = sum(rows)

    @property
    def reused(self):
        return int((~self.scores.computed).sum())


@pytest.mark.parametrize("estimator", ["pointwise", "expected"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, contextlib.nullcontext),
        (torch.bfloat16, contextlib.nullcontext),
        (torch.float32, bfloat16),
    ],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("architecture", ["tied", "soft-capped", "moe"])
def test_right_scores_pass_however_they_were_batched(
    tokenizer, tmp_path, architecture, dtype, autocast, estimator
):
    model = small_model(tokenizer, architecture, hidden_size=64).to(dtype)
    made = Run(tmp_path, model, autocast=autocast, mi_estimator=estimator)
    assert made.store.verified.scores == 0, "nothing was reused"
    for tokens in (1, 4096):
        run = Run(tmp_path, model, autocast=autocast, score_tokens=tokens, mi_estimator=estimator)
        assert (run.reused, run.shown) == (len(PAIRS), [])
        assert run.rows == run.store.verified.scores * (2 if estimator == "expected" else 1)
        assert 1 <= run.store.verified.scores <= SCORES
        assert run.store.verified.beyond == 0
    assert run.store.verified.scores == SCORES


#: What the identity of a reference does not tell, and changes its numbers.
UNSEEN = {
    "another model": lambda model, _: model.load_state_dict(
        small_model_like(model).state_dict(), strict=False
    ),
    "a library's function": lambda _, patch: patch.setattr(
        nn.functional, "scaled_dot_product_attention", no_attention
    ),
    "every linear layer": lambda _, patch: patch.setattr(nn.functional, "linear", rounded_linear),
}
attend, linear = nn.functional.scaled_dot_product_attention, nn.functional.linear


def small_model_like(model):
    other = recast(type(model)(model.config), type(model))
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs * 1.05)
    return other


def no_attention(query, key, value, *args, **kwargs):
    return attend(query, key, value, *args, **kwargs) * 0.9


def rounded_linear(hidden, weight, bias=None):
    return linear(hidden, weight.bfloat16().float(), bias)


@pytest.mark.parametrize("change", UNSEEN)
def test_scores_of_something_else_are_set_aside(tokenizer, tmp_path, monkeypatch, change):
    model = small_model(tokenizer, hidden_size=64)
    made = Run(tmp_path, model)
    old, before = stored(made.store), model_fingerprint(model)
    UNSEEN[change](model, monkeypatch)
    if change != "another model":
        assert model_fingerprint(model) == before, "or it has no need of this"
    fresh = Run(tmp_path / "elsewhere", model).scores
    run = Run(tmp_path, model)
    assert run.reused == 0
    assert torch.allclose(run.scores.mi_chosen, fresh.mi_chosen, atol=1e-4)
    assert run.store.verified.beyond > 0
    ((line, *_),) = run.shown
    aside = tmp_path / f"{run.store.path.name}.set-aside-{run.store.run}"
    assert line.startswith(f"{run.store.path}: of {SCORES} stored scores that were computed again ")
    assert f"up to {run.store.verified.difference:.3g} nats" in line
    assert aside.name in line
    assert len(stored(run.store)) == len(old)
    run.store.path = aside
    assert stored(run.store) == old, "as they were"
    again = Run(tmp_path, model)
    assert (again.reused, again.shown) == (len(PAIRS), [])


def test_what_cannot_be_set_aside_is_not_used_either(tokenizer, tmp_path, monkeypatch):
    model = small_model(tokenizer)
    made = Run(tmp_path, model)
    old = stored(made.store)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    run = Run(tmp_path, small_model(tokenizer, seed=1))
    assert run.reused == 0
    assert "cannot be set aside (Permission denied)" in run.shown[0][0]
    assert stored(made.store) == old


class Padded(Qwen2Model):
    """Its states depend on the padding of the batch, as those of DeepSeek-V3.2."""

    def forward(self, *args, attention_mask=None, **kwargs):
        outputs = super().forward(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.dim() == 2:
            outputs.last_hidden_state *= 1 + (attention_mask == 0).float().mean()
        return outputs


@pytest.fixture
def padded(tokenizer):
    model = small_model(tokenizer)
    recast(model.model, Padded)
    return model


def test_a_model_that_depends_on_its_padding_is_not_set_aside_for_that(padded, tmp_path):
    runs = [Run(tmp_path, padded) for _ in range(4)]
    assert max(run.store.verified.difference for run in runs) > 0.05
    assert [run.reused for run in runs] == [0, *[len(PAIRS)] * 3]


def test_a_single_score_is_told_from_noise_too(padded, tmp_path):
    """It is run beside another, so that there is padding."""
    run = Run(tmp_path, padded)
    (file,) = run.store.path.iterdir()
    keys, scores = run.store._columns(file)
    file.unlink()
    run.store.add(keys[:1], scores[:1, :1])
    again = Run(tmp_path, padded)
    assert (again.store.verified.scores, again.store.verified.beyond) == (1, 0)


def test_a_slow_device_computes_few_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.0)
    model = small_model(tokenizer)
    Run(tmp_path, model)
    run = Run(tmp_path, model)
    assert (run.store.verified.scores, run.rows) == (1, 1)


def test_rounding_grows_with_the_response_and_with_the_dtype():
    def of(eps, tokens, logps=0.0):
        job = ScoreRequest(np.arange(3), np.arange(tokens))
        return float(rounding(eps, [job], np.array([logps]))[0])

    exact, half = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    assert of(half, 100) == pytest.approx(10 * of(half, 1))
    assert of(half, 1) > 100 * of(exact, 1)
    assert of(exact, 100) < of(exact, 100, -500.0) < 0.01
    assert math.isfinite(of(half, 10_000))


def test_no_random_state_is_moved(tokenizer, tmp_path):
    model = small_model(tokenizer)
    Run(tmp_path, model)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert Run(tmp_path, model).store.verified.scores == SCORES
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert states == after
