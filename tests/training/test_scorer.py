"""What the scorer of a run computes, stores, writes and refuses."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from small_models import random_pairs, small_model

from bdpo_plugin import BDPOError
from bdpo_plugin.data.pairs import Side
from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.reference.fingerprint import AS_IT_IS
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.training.datasets import Usable
from bdpo_plugin.training.score_columns import SCORE_COLUMNS, score_columns
from bdpo_plugin.training.scorer import Scorer

TOKENIZER = build_tokenizer()
PAIRS = random_pairs(6)


@pytest.fixture
def reference():
    return Reference(small_model(TOKENIZER), "a small model", adapter=AS_IT_IS)


def scorer_of(folder, reference, **settings):
    settings = {"cache_dir": str(folder / "scores"), "null_prompt": "Hello"} | settings
    return Scorer(
        BDPOSettings(**settings),
        TOKENIZER,
        Accelerator(cpu=True),
        str(folder / "run"),
        0,
        None,
        pairs=PAIRS,
        reference=reference,
    )


def usable(name="train"):
    return Usable(name, Dataset.from_dict({"a": [0] * 6}), PAIRS, range(10, 16), None, {})


def test_a_batch_has_the_scores_of_its_dataset(tmp_path, reference):
    scorer = scorer_of(tmp_path, reference)
    scores = scorer.score(usable(), reference)
    of_dataset = score_columns(scores, scorer.weights(scores, usable()))
    of_batch = scorer.score_batch(PAIRS[2:4], reference)
    assert of_batch.keys() == set(SCORE_COLUMNS)
    for name, values in of_batch.items():
        torch.testing.assert_close(values, of_dataset[name][2:4], rtol=1e-5, atol=1e-5)


def test_another_run_of_the_same_reference_computes_nothing(tmp_path, reference):
    first, second = scorer_of(tmp_path / "a", reference), scorer_of(tmp_path / "b", reference)
    second.settings = first.settings  # one store
    scores = first.score(usable(), reference)
    again = second.score(usable(), reference)
    assert torch.equal(scores.mi_chosen, again.mi_chosen)
    assert first.scores_record()["pairs"] == {"train": {"scored now": 6, "reused": 0}}
    assert second.scores_record()["pairs"] == {"train": {"scored now": 0, "reused": 6}}
    assert second.scores_record()["verified"]["beyond rounding"] == 0
    assert first.identity == second.identity is not None


def test_the_file_has_the_weights_and_the_rows(tmp_path, reference):
    scorer = scorer_of(tmp_path, reference)
    scores = scorer.score(usable(), reference)
    weights = scorer.weights(scores, usable())
    scorer.save(usable(), scores, weights, file="reference_scores.parquet")
    table = pq.read_table(tmp_path / "run" / "bdpo" / "reference_scores.parquet").to_pydict()
    assert table["row"] == list(range(10, 16))
    assert table["weight_chosen"] == weights.chosen.tolist()


def test_a_reference_that_cannot_be_read_is_told_once(tmp_path, reference, capsys):
    reference.model.odd = iter(())  # shows only its address
    scorer = scorer_of(tmp_path, reference)
    capsys.readouterr()
    for name in ("train", "eval"):
        assert scorer.score(usable(name), reference).measured
    assert capsys.readouterr().out.count("WARNING") == 1
    assert scorer.scores_record()["identity"] == {"reference": None, "computation": None}
    assert not (tmp_path / "scores").exists()


def test_what_cannot_be_scored_is_refused(tmp_path, reference):
    scorer = scorer_of(tmp_path, reference)
    empty = PAIRS[0]._replace(chosen=Side(PAIRS[0].chosen.prompt_ids, np.zeros(0, np.int64)))
    with pytest.raises(BDPOError, match="no response token left"):
        scorer.score_batch([empty], reference)


def test_nothing_is_measured_that_no_weight_needs(tmp_path, reference):
    scorer = scorer_of(tmp_path, reference, balance=False, scaling=False)
    scores = scorer.score(usable(), reference)
    assert not scores.measured
    assert torch.equal(scorer.weights(scores).chosen, torch.ones(6))
