"""`bdpo doctor` on LLaMA-Factory configurations with planted faults, each named."""

import json

import pytest
import yaml

pytest.importorskip("llamafactory")

from doctor_runs import call_a_tool, doctor, fixes, rewrite, same_twice
from llamafactory_runs import config

from bdpo_plugin.demo.tiny import write
from bdpo_plugin.hosts.llamafactory.inspection import inspect
from bdpo_plugin.hosts.llamafactory.plan import plan_of

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, steps=0, train_pairs=8, eval_pairs=2, progress=False, hidden_size=32, layers=1)
    return tmp_path


def written(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder, folder / "out", **changes)))
    return path


def test_a_sound_configuration(folder):
    code, found, rows = doctor(written(folder))
    assert code == 0
    states = {name: state for name, of in found.items() for state, _ in of}
    for name in ("Axolotl", "GPU", "flash-attention", "memory"):
        del states[name]
    assert states.pop("pairs") == "warning"  # that they are few
    assert set(states.values()) == {"ok"}
    assert found["LLaMA-Factory"] == [("ok", "0.9.5, which is tested")]
    assert found["key in LLaMA-Factory"] == [("ok", "`pref_loss: bdpo` works")]
    assert found["pairs"][0] == ("ok", "8 of 8 can be trained on")
    assert found["pairs"][1][1].startswith("8 pairs are enough to see whether a run works")
    raw = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row, of in zip(rows, raw[:3], strict=True):  # the file's first rows, in its order
        assert of["messages"][0]["content"] in row["prompt"]
        for side in ("chosen", "rejected"):
            assert row[side] == of[side]["content"] + "<|im_end|>\n"
    assert not (folder / "out").exists()


def test_a_dataset_without_a_column_and_one_that_is_not_there(folder):
    rewrite(folder / "train.jsonl", lambda number, row: row.pop("rejected"))
    code, found, _ = doctor(written(folder))
    assert code == 1
    assert "there is no `rejected`, only" in found["configuration"][0][1]
    code, found, _ = doctor(written(folder, dataset="nonesuch"))
    assert code == 1
    assert "nonesuch" in found["configuration"][0][1]


def test_chosen_identical_to_rejected(folder):
    rewrite(folder / "train.jsonl", same_twice)
    code, found, _ = doctor(written(folder))
    assert code == 0
    assert found["pairs"][0][0] == "warning"
    assert found["pairs"][0][1].startswith(
        "2 of 8 pairs of the train data: chosen and rejected are"
    )


def test_a_response_longer_than_the_sequence_length(folder):
    def longer(number, row):
        if number < 3:
            row["chosen"]["content"] += " Then walk." * 200

    rewrite(folder / "train.jsonl", longer)
    _, found, _ = doctor(written(folder))
    assert found["length"][0][0] == "warning"
    assert "`cutoff_len: 256`: 3 pairs are cut" in found["length"][0][1]
    needed = int(fixes(written(folder))["length"].removeprefix("cutoff_len: "))
    _, found, _ = doctor(written(folder, cutoff_len=needed))
    assert found["length"] == [
        ("ok", f"`cutoff_len: {needed}`; the longest sequence has {needed} tokens")
    ]


def test_tool_calls_that_are_dropped(folder):
    rewrite(folder / "train.jsonl", call_a_tool)
    _, found, _ = doctor(written(folder))
    state, words = found["tools and images"][0]
    assert state == "warning"
    assert "tool calls (rows 1, 2)" in words


def test_keys(folder):
    code, found, _ = doctor(written(folder, bdpo_alfa=1.0))
    assert code == 1
    assert "Did you mean `bdpo_alpha`?" in found["configuration"][0][1]
    code, found, _ = doctor(written(folder, pref_loss="sigmoid", deepspeed="z.json"))
    assert code == 0
    assert found["keys"] == [("warning", "this is no B-DPO run: it has not `pref_loss: bdpo`")]


def test_a_template_of_another_model_and_the_first_rows_of_the_file(folder):
    """A part of the rows is drawn for the evaluation, and the rest is shuffled. LLaMA-Factory gives
    the tokenizer the template's last token, and the model no embedding of it."""
    path = written(folder, template="phi", val_size=0.25)
    code, found, rows = doctor(path)
    assert code == 1
    (lost, words), (state, more) = found["special tokens"]
    assert (lost, state) == ("warning", "failed")
    assert words.startswith("the model reads <|user|>, <|assistant|>")
    assert more.startswith("the data has the token '<|end|>'")
    assert fixes(path)["special tokens"] == "resize_vocab: true"
    raw = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row, of in zip(rows, raw[:3], strict=True):
        assert of["messages"][0]["content"] in row["prompt"]
    _, found, _ = doctor(written(folder, template=None))
    assert found["special tokens"][0][0] == "ok"


def test_a_recipe_is_estimated_as_the_configuration_that_the_host_reads(folder):
    path = written(folder)
    assert inspect(path).plan == plan_of(yaml.safe_load(path.read_text()))
