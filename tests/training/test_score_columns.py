"""No column of a user's data is taken for a result of the run."""

import math
import re
from pathlib import Path

import cases
import pytest
from datasets import Dataset, load_dataset
from running import history, pairs, scores, trainer

from bdpo_plugin import BDPOError
from bdpo_plugin.training.score_columns import SCORE_COLUMNS


def shown(capsys):
    """The output, without the frames and line breaks of its tables."""
    return re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def with_constants(dataset, columns, value=0.5):
    for column in columns:
        dataset = dataset.add_column(column, [value] * len(dataset))
    return dataset


@pytest.mark.parametrize("precompute", cases.first(1, [True, False]))
def test_columns_named_as_results_are_left_out_with_a_word(tmp_path, capsys, precompute):
    plain = trainer(output_dir=tmp_path / "plain", bdpo_precompute=precompute)
    plain.train()
    capsys.readouterr()
    named = ("ref_chosen_logps", "ref_rejected_logps", *SCORE_COLUMNS, "bdpo_row", "bdpo_length")
    for value in (0.5, None, "text"):
        made = trainer(
            output_dir=tmp_path / str(value),
            dataset=with_constants(pairs(), named, value),
            evaluation=with_constants(pairs(8, seed=1), named, value),
            eval_strategy="steps",
            eval_steps=4,
            bdpo_precompute=precompute,
        )
        out = shown(capsys)
        for name in ("train", "eval"):
            assert f"the {name} data has columns named as results of a run: ref_chosen_logps" in out
        made.train()
        assert history(made, "loss") == history(plain, "loss")
        assert history(made, "bdpo/scale") == history(plain, "bdpo/scale")


def test_the_data_of_an_earlier_run_is_scored_again(tmp_path, capsys):
    earlier = trainer(output_dir=tmp_path / "a", bdpo_alpha=3.0)
    capsys.readouterr()
    made = trainer(output_dir=tmp_path / "b", dataset=earlier.train_dataset, bdpo_alpha=0.0)
    assert "named as results of a run" in shown(capsys)
    made.train()
    assert history(made, "bdpo/weight_chosen") == [1.0] * 4
    assert history(made, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


def test_data_that_another_trainer_scored_is_refused_where_it_is_given_later(tmp_path):
    other = trainer(output_dir=tmp_path / "a", evaluation=pairs(6, seed=2), bdpo_alpha=3.0)
    made = trainer(output_dir=tmp_path / "b", evaluation=pairs(6, seed=1))
    made.eval_dataset = other.eval_dataset
    with pytest.raises(BDPOError, match="evaluation data does not come from a dataset that was sc"):
        made.evaluate()
    made.train_dataset = other.train_dataset
    with pytest.raises(BDPOError, match="training data does not come from a dataset that was sco"):
        made.train()


def test_predict_scores_data_that_is_new_to_it(tmp_path):
    """Raw data, and data that another trainer has scored, as `evaluate` does; only by a model that
    training has changed it cannot be scored any more."""
    new = pairs(6, seed=2)
    other = trainer(output_dir=tmp_path / "a", evaluation=new, bdpo_alpha=3.0)
    losses = {}
    for name, options in (("given", {"evaluation": new}), ("each", {"bdpo_precompute": False})):
        made = trainer(output_dir=tmp_path / name, max_steps=2, **options)
        made.train()
        losses[name] = made.predict(made.eval_dataset or new).metrics["test_loss"]
    made = trainer(output_dir=tmp_path / "new", max_steps=2)
    made.train()
    for name, dataset in (("raw", new), ("of another", other.eval_dataset)):
        losses[name] = made.predict(dataset).metrics["test_loss"]
    assert abs(losses["given"] - math.log(2)) > 1e-3
    assert losses == dict.fromkeys(losses, pytest.approx(losses["given"], abs=1e-5))

    whole = trainer(output_dir=tmp_path / "e", evaluation={"test": new}, lora=False, max_steps=1)
    whole.train()
    assert "test_loss" in whole.predict(whole.eval_dataset["test"]).metrics
    with pytest.raises(BDPOError, match="the one before training, has been trained since"):
        whole.predict(pairs(4, seed=3))


def test_scored_data_that_was_changed_since_is_refused(tmp_path):
    made = trainer(output_dir=tmp_path)
    swap = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    made.train_dataset = made.train_dataset.rename_columns(swap)
    with pytest.raises(BDPOError, match="do not change them afterwards"):
        made.train()


def test_a_column_called_length_is_not_the_length(tmp_path):
    texts = with_constants(pairs(16), ["length"], "short")
    made = trainer(
        output_dir=tmp_path, dataset=texts, train_sampling_strategy="group_by_length", max_steps=1
    )
    made.train()
    assert history(made, "loss")


def test_lengths_are_known_without_a_pass(tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "bdpo_precompute": False}
    made = trainer(output_dir=tmp_path, max_steps=1, **options)
    made.train()
    assert history(made, "loss")


def test_a_stream_with_such_columns(tmp_path):
    options = {"bdpo_precompute": False, "max_steps": 1}
    plain = trainer(output_dir=tmp_path / "a", dataset=pairs().to_iterable_dataset(), **options)
    plain.train()
    Path(tmp_path, "rows").mkdir()
    named = with_constants(pairs(), ["ref_chosen_logps", "ref_rejected_logps", "bdpo_scale"])
    named.to_json(tmp_path / "rows/rows.jsonl")
    stream = load_dataset("json", data_dir=str(tmp_path / "rows"), split="train", streaming=True)
    made = trainer(output_dir=tmp_path / "b", dataset=stream, **options)
    made.train()
    assert history(made, "loss") == history(plain, "loss")


def test_an_evaluation_set_given_later_keeps_the_file_of_the_first(tmp_path):
    made = trainer(output_dir=tmp_path, evaluation=pairs(6, seed=2))
    first = scores(tmp_path, "reference_scores.eval.parquet")
    made.evaluate(pairs(9, seed=5))
    made.evaluate(pairs(9, seed=5))
    assert scores(tmp_path, "reference_scores.eval.parquet") == first
    (later,) = Path(tmp_path, "bdpo").glob("reference_scores.eval.*.parquet")
    assert len(scores(tmp_path, later.name)["row"]) == 9


def test_an_evaluation_set_given_later_is_checked_without_a_pass_too(tmp_path, capsys):
    made = trainer(output_dir=tmp_path, bdpo_precompute=False, max_steps=1)
    rows = pairs(6, seed=2).to_list()
    rows[2]["rejected"] = rows[2]["chosen"]
    assert made.evaluate(Dataset.from_list(rows))["eval_loss"] > 0
    assert "chosen and rejected are identical (dropped; rows 2)" in shown(capsys)


@pytest.mark.parametrize(
    "name", ["x/../../../../escaped", "org/set", "[/bold]x", "[red]", "..", "a" * 300, "é\x1b[31m"]
)
def test_the_name_of_an_evaluation_set_is_only_a_name(tmp_path, capsys, name):
    folder = tmp_path / "deep" / "run"
    trainer(output_dir=folder, evaluation={name: pairs(4, seed=9)})
    files = sorted(p for p in tmp_path.rglob("*") if p.name.startswith("reference_scores"))
    assert len(files) == 2
    assert {file.parent for file in files} == {folder / "bdpo"}
    assert "of the pairs" in shown(capsys)


def test_names_that_are_alike_have_files_of_their_own(tmp_path):
    names = ["a/b", "a b", "a_b"]
    trainer(output_dir=tmp_path, evaluation={name: pairs(4, seed=9) for name in names})
    assert len(list(Path(tmp_path, "bdpo").glob("reference_scores.*_*.parquet"))) == 3
