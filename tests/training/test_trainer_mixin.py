"""Only what a trainer has prepared itself is trained on or evaluated."""

import json
from pathlib import Path

import pytest
from running import history, pairs, scores, trainer

from bdpo_plugin import BalanceWeights, BDPOError


def test_evaluation_sets_keep_their_names(tmp_path):
    evaluation = {"near": pairs(4, seed=1), "far away": pairs(6, seed=2)}
    made = trainer(output_dir=tmp_path, evaluation=evaluation)
    assert {name: len(data) for name, data in made.eval_dataset.items()} == {
        "near": 4,
        "far away": 6,
    }
    files = sorted(path.name for path in Path(tmp_path, "bdpo").glob("*.parquet"))
    assert len(files) == 3
    assert "reference_scores.near.parquet" in files
    assert made.evaluate(eval_dataset="near")["eval_loss"] > 0


def test_a_dataset_that_is_given_later_is_prepared_only_without_precompute(tmp_path):
    late = trainer(output_dir=tmp_path / "late", bdpo_precompute=False)
    late.eval_dataset = late.train_dataset.select(range(4))
    assert late.evaluate()["eval_loss"] > 0
    early = trainer(output_dir=tmp_path / "early")
    early.train_dataset = early.train_dataset.shuffle(seed=0)
    with pytest.raises(BDPOError, match="The training data does not come from a dataset that was"):
        early.train()


def test_a_callable_that_asks_for_columns_needs_precompute(tmp_path):
    def weigh(won, lost, *, topic):
        return BalanceWeights(won, lost, won)

    with pytest.raises(BDPOError, match=r"asks for topic: .* Set `bdpo_precompute: true`"):
        trainer(output_dir=tmp_path, weigh=weigh, bdpo_precompute=False)


def test_a_control_marks_the_log_and_the_record(tmp_path):
    made = trainer(output_dir=tmp_path, bdpo_control="swapped", max_steps=2)
    made.train()
    assert history(made, "bdpo/control") == [1, 1]
    assert json.loads((tmp_path / "bdpo" / "run.json").read_text())["control"] == "swapped"
    table = scores(tmp_path)
    for won, lost, weight in zip(
        table["mi_chosen"], table["mi_rejected"], table["weight_chosen"], strict=True
    ):
        assert (weight > 1) == (won > lost), "B-DPO itself lowers the weight of the higher MI"
