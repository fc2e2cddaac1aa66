"""`bdpo doctor`, `bdpo mi` and `bdpo recipes check` on a configuration of LLaMA-Factory that has
every key by which a run sends, reports or saves: none of them does."""

import json
import shutil
from dataclasses import fields

import pytest
import yaml

pytest.importorskip("llamafactory")

from commandline import bdpo
from doctor_runs import doctor
from guarded import cold, mi_of_two_sets, nothing_but, value_of
from llamafactory.hparams import parser
from llamafactory_runs import config

from bdpo_plugin.hosts.llamafactory.side_effects import DROPPED, SHARES

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny model, and two sets of pairs: messages, and text."""
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:8]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = [
        {
            "instruction": row["messages"][0]["content"],
            "label": row["query_type"],
            **{side: row[side]["content"] for side in ("chosen", "rejected")},
        }
        for row in rows
    ]
    (folder / "more").mkdir()
    (folder / "more" / "train.json").write_text(json.dumps(text))
    info = json.loads((folder / "dataset_info.json").read_text())
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info["text"] = {"file_name": "more/train.json", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write(folder, **changes):
    """A configuration with all such keys."""
    types = {field.name: field.type for group in parser._TRAIN_ARGS for field in fields(group)}
    asked = {key: value_of(types[key], key) for key in sorted(DROPPED)}
    asked |= {"tokenized_path": str(folder / "tokenised"), "offload_folder": str(folder / "off")}
    asked |= {"deepspeed": "z3.json", "fsdp": "full_shard", "report_to": "all"}
    assert asked.keys() >= DROPPED | SHARES - {"fsdp_config"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder, folder / "out", **(asked | changes))))
    return path


def test_doctor_and_check(folder, monkeypatch):
    path = write(folder, dataset="train,text")
    with nothing_but(folder, monkeypatch=monkeypatch):
        shown = cold("bdpo", "doctor", str(path), "--json")
    assert "16 of 16 can be trained on" in shown
    with nothing_but(folder, monkeypatch=monkeypatch):
        bdpo("recipes", "check", str(path))


def test_mi_of_text_and_of_messages(folder, monkeypatch):
    mi_of_two_sets(
        write(folder, dataset="train,text"),
        folder,
        monkeypatch,
        ("train-0-balanced.jsonl", "train-1-balanced.json"),
        ("train.jsonl", "train.json"),
    )


def test_data_that_was_tokenised_before_is_told(folder, monkeypatch):
    """What `tokenized_path` has is all that a training reads; `doctor` never writes it."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    there = str(folder / "tokenised")
    path = folder / "config.yaml"
    keys = config(folder, folder / "out", tokenized_path=there, cutoff_len=24)
    model_args, data_args, training_args, *_ = get_train_args(dict(keys))
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    get_dataset(template, model_args, data_args, training_args, stage="rm", **module)
    path.write_text(yaml.safe_dump(keys | {"cutoff_len": 256, "dataset": "text"}))
    with nothing_but(folder, monkeypatch=monkeypatch):
        code, found, _ = doctor(path)
    assert code == 0
    state, words = found["data"][0]
    assert state == "warning"
    assert f"`tokenized_path: {there}` has data that was tokenised before" in words
    assert found["length"][0] == (
        "not known",
        "the longest sequence has 24 tokens, as it was tokenised before: `cutoff_len: 256` has no "
        "effect",
    )


def test_nothing_is_left_after_an_error(folder, monkeypatch):
    for changes in ({"dataset": "nonesuch"}, {"dataset": "train", "bdpo_alfa": 1.0}):
        path = write(folder, **changes)
        with nothing_but(folder, monkeypatch=monkeypatch):
            code, _, _ = doctor(path)
        assert code == 1


def test_a_model_that_is_not_there(folder):
    path = write(folder, model_name_or_path=str(folder / "nowhere"))
    for command in ("doctor", "mi"):
        code, shown = bdpo(command, str(path))
        assert code == 1
        words = " ".join(shown.replace("│", " ").split())
        assert "nowhere` is no model that can be loaded: there is no such folder here" in words
