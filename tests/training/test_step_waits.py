"""How often a step and the scoring wait for the device, on one that is none."""

import sys

import numpy as np
import pytest
import torch
from fake_device import DEVICE, OnDevice, device_in_use, put
from small_models import small_model

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference import scoring
from bdpo_plugin.reference.scoring import ScoreRequest
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.score_columns import SCORE_COLUMNS
from bdpo_plugin.training.step import LossTerms, MetricSums, preference_step


@pytest.fixture
def non_blocking(monkeypatch):
    """As on CUDA, where a copy to the device need not be waited for."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("bdpo_plugin.") and hasattr(module, "to_device"):
            monkeypatch.setattr(module, "to_device", lambda t, to: t.to(to, non_blocking=True))


def batch_of(pairs, vocabulary, prompt=6):
    """Token ids, mask and trained tokens, the chosen rows first, each pair after one prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (2 * pairs, prompt + 9), generator=generator)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    mask = torch.ones_like(ids)
    for row in range(2 * pairs):
        mask[row, prompt + 1 + row :] = 0
    completion_mask = mask.bool()
    completion_mask[:, :prompt] = False
    return ids, mask, completion_mask


def step(model, reader, terms=("sigmoid", "sft")):
    ids, mask, completion_mask = map(OnDevice, batch_of(2, 60))
    batch = PreferenceBatch.of(
        {"input_ids": ids, "attention_mask": mask}, completion_mask, without=()
    )
    scores = {name: OnDevice(torch.ones(2)) for name in SCORE_COLUMNS}
    loss, metrics, _ = preference_step(
        reader, model, batch, scores, LossTerms(terms, [1.0] * len(terms), 0.1)
    )
    MetricSums(lambda sums: sums).add(metrics)
    loss.backward()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_wait_a_step(tokenizer, non_blocking, attention):
    """The token ids of the batch, with its masks. With eager attention the batch is padded."""
    model = small_model(tokenizer, "untied", layers=2)
    model.set_attn_implementation(attention)
    put(model).train()
    reader = ResponseReader()
    with device_in_use() as waits:
        step(model, reader)  # in which the model is met
        waits.clear()
        step(model, reader)
    kind = {"sdpa": "shared prefix", "eager": "padded"}[attention]
    assert reader.layouts["training"].batches == {kind: 2}, reader.layouts
    # a mask of eager attention is the model's own affair
    (ours,) = [where for where in waits if "/transformers/" not in where]
    assert "a copy from the device" in ours
    assert "/bdpo_plugin/training/batch.py:" in ours
    assert waits[ours] == 1


@pytest.mark.parametrize("null", [None, np.array([7, 8])], ids=["log-probabilities", "gain"])
def test_a_batch_is_queued_for_scoring_without_a_wait(tokenizer, non_blocking, null):
    model = put(small_model(tokenizer, "untied", layers=2))
    jobs = [ScoreRequest(np.arange(5, 11), np.arange(20, 24 + n), null) for n in range(2)]
    reader = ResponseReader()
    with device_in_use() as waits, torch.no_grad():
        for _ in range(2):
            waits.clear()
            sums = scoring._queue(jobs, model, reader, DEVICE, may_pack=True)
        assert not waits
        sums.scores()
        assert len(waits) == 1
    assert reader.layouts["scoring"].batches == {"shared prefix": 2}


def test_a_wait_is_noted(non_blocking):
    values = OnDevice(torch.arange(3.0))
    with device_in_use() as waits:
        assert float(values.sum()) == 3
        values[OnDevice(torch.tensor([True, False, True]))]
        torch.ones(3).to(values.device)
    assert sum(waits.values()) == 3
