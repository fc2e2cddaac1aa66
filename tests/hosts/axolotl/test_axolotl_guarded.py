"""`bdpo doctor`, `bdpo mi` and `bdpo recipes check` on an Axolotl configuration that has every key
by which a run sends, reports or saves: none of them does."""

import json
import shutil

import pytest

pytest.importorskip("axolotl")

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl_runs import write_config
from commandline import bdpo
from guarded import cold, mi_of_two_sets, nothing_but, value_of
from real_runs import make_tiny

from bdpo_plugin.hosts.axolotl.side_effects import DROPPED, SAVES, SHARES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny model, and two sets of pairs: messages, and text."""
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:8]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more").mkdir()
    with (folder / "more" / "train.jsonl").open("w") as file:
        for row in rows:
            text = {side: row[side]["content"] for side in ("chosen", "rejected")}
            text |= {"instruction": row["messages"][0]["content"], "label": row["query_type"]}
            file.write(json.dumps(text) + "\n")
    return folder


#: What a run does only with other keys, or with none of some.
NOT_TOGETHER = {
    "save_strategy": "steps",
    "saves_per_epoch": None,
    "load_best_model_at_end": None,
    "added_tokens_overrides": None,
    "hub_strategy": "every_save",
    "hf_use_auth_token": True,
    "dynamic_checkpoint": {"enabled": True},
    "resume_from_checkpoint": None,
    "save_total_limit": 2,
    "strict": True,
}


def write(folder, **changes):
    """A configuration with all such keys, but those that several processes need."""
    fields = AxolotlInputConfig.model_fields
    asked = {
        key: value_of(fields[key].annotation, key) if key in fields else f"a-{key}"
        for key in sorted(DROPPED | SAVES - SHARES)
    }
    data = {"ds_type": "json", "split": "train"}
    sets = [
        {"path": str(folder / "train.jsonl"), "type": "chat_template.default", **data},
        {"path": str(folder / "more" / "train.jsonl"), "type": "chatml.default", **data},
    ]
    keys = {"datasets": sets, "dataset_prepared_path": None}
    return write_config(folder / "run.yml", folder, **(asked | keys | NOT_TOGETHER | changes))


def test_doctor_and_check(folder, monkeypatch):
    """By `axolotl bdpo`, which has imported Axolotl before our command begins."""
    path = write(folder)
    with nothing_but(folder, monkeypatch=monkeypatch):
        shown = cold("axolotl", "bdpo", "doctor", str(path), "--json")
    assert "16 of 16 can be trained on" in shown
    with nothing_but(folder, monkeypatch=monkeypatch):
        bdpo("recipes", "check", str(path))


def test_mi_of_text_and_of_messages(folder, monkeypatch):
    mi_of_two_sets(
        write(folder),
        folder,
        monkeypatch,
        ("train-0-balanced.jsonl", "train-1-balanced.jsonl"),
        ("run/train.jsonl", "more/train.jsonl"),
    )


def test_what_axolotl_refuses_of_the_keys_that_are_dropped(folder):
    code, shown = bdpo("doctor", str(write(folder, hf_use_auth_token=None)), "--json")
    assert code == 1
    assert "Require cfg.hf_use_auth_token to be True for push_dataset_to_hub" in shown
