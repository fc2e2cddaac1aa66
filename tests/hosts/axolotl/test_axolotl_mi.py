"""`bdpo mi` on an Axolotl configuration, and `axolotl train` after it."""

import json
import re

import pytest

pytest.importorskip("axolotl")

from axolotl_runs import axolotl, server, write_config
from mi_runs import check_rows, mi, pairs
from real_runs import make_tiny
from running import scores

pytestmark = pytest.mark.slow

COUNTS = re.compile(r"(\d+): (\d+) scored now, (\d+) reused")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def rows_of(tiny):
    return [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]


def test_training_scores_nothing_again(tiny, tmp_path):
    data = {"ds_type": "json", "type": "chat_template.default", "split": "train"}
    evaluation = [{"path": str(tiny / "eval.jsonl"), **data}]
    config = write_config(tmp_path / "run.yml", tiny, test_datasets=evaluation)
    out = mi(config, "--split", "balanced", "--fraction", "0.25", server=server())
    assert COUNTS.findall(out) == [("32", "32", "0"), ("8", "8", "0")]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "prepared").exists()

    out = axolotl("train", config, "--launcher", "python").stdout
    assert COUNTS.findall(out) == [("32", "0", "32"), ("8", "0", "8")]
    assert scores(tmp_path / "bdpo-mi") == scores(tmp_path / "run")

    rows = rows_of(tiny)
    check_rows(tmp_path / "bdpo-mi", rows)
    apart = {p["row"]: abs(p["numbers"][0] - p["numbers"][1]) for p in pairs(tmp_path / "bdpo-mi")}
    kept = [json.loads(x) for x in (tmp_path / "bdpo-mi/train-balanced.jsonl").open()]
    assert kept == [rows[i] for i in sorted(sorted(apart, key=apart.get)[:8])]


def test_plain_dpo_with_rows_held_back_and_cut(tiny, tmp_path):
    """`rl: dpo` without our plugin; some rows are for evaluation, and long responses are cut;
    the training would be in several processes."""
    config = write_config(
        tmp_path / "run.yml",
        tiny,
        rl="dpo",
        plugins=None,
        val_set_size=0.25,
        sequence_len=40,
        excess_length_strategy="truncate",
        deepspeed=str(tmp_path / "of-several-processes.json"),
    )
    out = mi(config, "--output", tmp_path / "out", server=server())
    assert sorted(int(count) for count, _, _ in COUNTS.findall(out)) == [8, 24]
    rows = rows_of(tiny)
    check_rows(tmp_path / "out", rows, cut=True)
    assert any(
        pair[side] != rows[pair["row"]][side]["content"]
        for pair in pairs(tmp_path / "out")
        for side in ("chosen", "rejected")
    )
