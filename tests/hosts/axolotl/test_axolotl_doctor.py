"""`bdpo doctor` on Axolotl configurations with planted faults, each named."""

import json
import re

import pytest
import yaml

pytest.importorskip("axolotl")

from doctor_runs import call_a_tool, doctor, fixes, rewrite, same_twice

from bdpo_plugin.demo.tiny import write
from bdpo_plugin.hosts.axolotl.inspection import inspect
from bdpo_plugin.hosts.axolotl.plan import plan_of

pytestmark = pytest.mark.slow

RUN = {
    "plugins": ["bdpo_plugin.BDPOPlugin"],
    "rl": "bdpo",
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "sequence_len": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "optimizer": "adamw_torch",
    "bf16": False,
    "tf32": False,
    "dataset_num_proc": 1,
}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, steps=0, train_pairs=8, eval_pairs=2, progress=False, hidden_size=32, layers=1)
    return tmp_path


def config(folder, **changes):
    data = {"path": str(folder / "train.jsonl"), "ds_type": "json", "type": "chat_template.default"}
    merged = {
        **RUN,
        "base_model": str(folder / "model"),
        "datasets": [{**data, "split": "train"}],
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))
    return path


def test_a_sound_configuration(folder):
    code, found, rows = doctor(config(folder))
    assert code == 0
    states = {name: state for name, of in found.items() for state, _ in of}
    del states["LLaMA-Factory"], states["GPU"], states["flash-attention"], states["memory"]
    assert states.pop("pairs") == "warning"  # that they are few
    assert set(states.values()) == {"ok"}
    assert found["pairs"][0] == ("ok", "8 of 8 can be trained on")
    assert found["pairs"][1][1].startswith("8 pairs are enough to see whether a run works")
    assert (
        "'<|im_start|>user\\n<|im_end|>\\n<|im_start|>assistant\\n'" in found["null prompt"][0][1]
    )
    raw = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row, of in zip(rows, raw[:3], strict=True):  # the file's first rows, in its order
        assert of["messages"][0]["content"] in row["prompt"]
        for side in ("chosen", "rejected"):
            assert row[side] == of[side]["content"] + "<|im_end|>"
    assert not (folder / "out").exists()


def test_a_plugin_misspelt(folder):
    code, found, _ = doctor(config(folder, plugins=["bdpo_plugn.BDPOPlugin"]))
    assert code == 1
    state, words = found["configuration"][0]
    assert state == "failed"
    assert "`plugins: [bdpo_plugn.BDPOPlugin]` cannot be imported" in words


def test_a_dataset_that_is_not_there_and_one_without_a_column(folder):
    path = config(folder)
    rewrite(folder / "train.jsonl", lambda number, row: row.pop("rejected"))
    code, found, _ = doctor(path)
    assert code == 1
    assert "there is no `rejected`, only" in found["configuration"][0][1]
    (folder / "train.jsonl").unlink()
    code, found, _ = doctor(path)
    assert code == 1
    assert str(folder / "train.jsonl") in found["configuration"][0][1]


def test_chosen_identical_to_rejected(folder):
    rewrite(folder / "train.jsonl", same_twice)
    code, found, _ = doctor(config(folder))
    assert code == 0
    state, words = found["pairs"][0]
    assert state == "warning"
    assert words.startswith("2 of 8 pairs of the train data: chosen and rejected are identical")
    assert re.search("rows (0, 3|3, 0)", words)  # of the file, in the order of the run


@pytest.mark.parametrize("choice", [None, "tokenizer_default"])
def test_no_chat_template(folder, choice):
    (folder / "model" / "chat_template.jinja").unlink()
    code, found, _ = doctor(config(folder, chat_template=choice))
    assert code == 1
    assert "has no chat template" in found["configuration"][0][1]


def test_a_response_longer_than_the_sequence_length(folder):
    def longer(number, row):
        if number < 3:
            row["chosen"]["content"] += " Then walk." * 200

    assert fixes(config(folder, sequence_len=8)) | {"pairs": ""} == {
        "configuration": "sequence_len: 16  # twice as long",
        "pairs": "",
    }
    rewrite(folder / "train.jsonl", longer)
    _, found, _ = doctor(config(folder))
    assert found["length"][0][0] == "warning"
    assert "`sequence_len: 256`: 3 rows are longer and left out" in found["length"][0][1]
    _, found, _ = doctor(config(folder, excess_length_strategy="truncate"))
    assert found["length"][0][0] == "warning"
    assert "3 pairs are cut" in found["length"][0][1]
    needed = int(fixes(config(folder))["length"].removeprefix("sequence_len: "))
    _, found, _ = doctor(config(folder, sequence_len=needed))
    assert found["length"] == [
        ("ok", f"`sequence_len: {needed}`; the longest sequence has {needed} tokens")
    ]


def test_tool_calls_that_the_template_drops(folder):
    rewrite(folder / "train.jsonl", call_a_tool)
    _, found, _ = doctor(config(folder))
    state, words = found["tools and images"][0]
    assert state == "warning"
    assert "tool calls (rows 1, 2)" in words


def test_a_template_with_thoughts(folder):
    template = folder / "model" / "chat_template.jinja"
    thought = (
        "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}"
    )
    template.write_text(template.read_text() + thought)
    _, found, _ = doctor(config(folder))
    state, words = found["thinking"][0]
    assert state == "warning"
    assert "8 of 8 pairs have none" in words


def test_a_key_that_nobody_knows_and_one_of_ours_misspelt(folder):
    _, found, _ = doctor(config(folder, lora_rr=4))
    assert found["keys"] == [("warning", "Axolotl knows no `lora_rr`, and drops it silently")]
    code, found, _ = doctor(config(folder, bdpo_alfa=1.0))
    assert code == 1
    assert "Did you mean `bdpo_alpha`?" in found["configuration"][0][1]


def test_what_the_configuration_asks_for_and_the_machine_has_not(folder):
    code, found, _ = doctor(config(folder, attn_implementation="flash_attention_2"))
    assert code == 1
    state, words = found["flash-attention asked for"][0]
    assert state == "failed"
    assert words.endswith("not usable: RuntimeError: there is no GPU")


def test_a_template_of_another_model_and_the_first_rows_of_the_file(folder):
    """A part of the rows is drawn for the evaluation, and the rest is shuffled."""
    path = config(folder, chat_template="phi_35", val_set_size=0.25)
    code, found, rows = doctor(path)
    assert code == 0
    state, words = found["special tokens"][0]
    assert state == "warning"
    assert words.startswith("the model reads <|user|>, <|end|>, <|assistant|>")
    assert fixes(path)["special tokens"] == "chat_template: tokenizer_default"
    raw = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row, of in zip(rows, raw[:3], strict=True):
        assert of["messages"][0]["content"] in row["prompt"]


def test_a_controls_column_that_the_evaluation_set_lacks(folder):
    rewrite(folder / "eval.jsonl", lambda number, row: row.pop("query_type"))
    entry = {"path": str(folder / "eval.jsonl"), "ds_type": "json", "split": "train"}
    path = config(
        folder,
        test_datasets=[{**entry, "type": "chat_template.default"}],
        bdpo_control="shuffled:query_type",
    )
    code, found, _ = doctor(path)
    assert code == 1
    state, words = found["control"][0]
    assert state == "failed"
    assert "the eval data has no column `query_type`" in words
    assert fixes(path)["control"] == "bdpo_control: shuffled"


def test_a_recipe_is_estimated_as_the_configuration_that_the_host_reads(folder):
    keys = yaml.safe_load(config(folder, bdpo_score_tokens=512).read_text())
    assert inspect(keys).plan == plan_of(keys)


def test_plain_dpo_is_told(folder):
    code, found, _ = doctor(config(folder, rl="dpo", plugins=None))
    assert code == 0
    assert found["keys"] == [("warning", "this is no B-DPO run: it has not `rl: bdpo`")]


def test_no_token_is_shown(folder, monkeypatch, capfd):
    """Of the environment, of the configuration and in the data, in any message."""
    secret, other = "hf_" + "SecretOfATest" * 2, "another-secret-of-a-test"
    monkeypatch.setenv("HF_TOKEN", secret)

    def leak(number, row):
        row["messages"][0]["content"] += f" {secret} {other}"

    rewrite(folder / "train.jsonl", leak)
    code, found, rows = doctor(config(folder, comet_api_key=other, excess_length_strategy=other))
    assert code == 1
    code, found, rows = doctor(config(folder, comet_api_key=other))
    assert code == 0
    shown = repr((found, rows)) + "".join(capfd.readouterr())
    assert "(left out) (left out)" in shown
    assert secret not in shown
    assert other not in shown
