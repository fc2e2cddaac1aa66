"""`bdpo mi` on a LLaMA-Factory configuration, and `llamafactory-cli train` after it."""

import json
import re

import pytest

pytest.importorskip("llamafactory")

import warm
import yaml
from llamafactory_runs import config, scores, train
from mi_runs import check_rows, mi, pairs

pytestmark = pytest.mark.slow

COUNTS = re.compile(r"(\d+): (\d+) scored now, (\d+) reused")


def rows_of(tiny):
    return [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]


def write(path, tiny, **changes):
    path.write_text(yaml.safe_dump(config(tiny, path.with_suffix(""), **changes)))
    return path


def test_training_scores_nothing_again(tiny, tmp_path):
    server = warm.server("llamafactory.train.tuner")
    path = write(tmp_path / "run.yaml", tiny, eval_dataset="eval")
    out = mi(path, "--split", "imbalanced", "--fraction", "0.25", server=server)
    assert COUNTS.findall(out) == [("32", "32", "0"), ("8", "8", "0")]
    assert not (tmp_path / "run").exists()

    out = train(tiny, tmp_path / "run", eval_dataset="eval")
    assert COUNTS.findall(out) == [("32", "0", "32"), ("8", "0", "8")]
    assert scores(tmp_path / "bdpo-mi") == scores(tmp_path / "run")

    rows = rows_of(tiny)
    check_rows(tmp_path / "bdpo-mi", rows)
    apart = {p["row"]: abs(p["numbers"][0] - p["numbers"][1]) for p in pairs(tmp_path / "bdpo-mi")}
    kept = [json.loads(x) for x in (tmp_path / "bdpo-mi/train-imbalanced.jsonl").open()]
    assert kept == [rows[i] for i in sorted(sorted(apart, key=lambda i: -apart[i])[:8])]


def test_plain_dpo_with_rows_held_back_and_cut(tiny, tmp_path):
    """`pref_loss: sigmoid`; some rows are for evaluation, and long responses are cut; the
    training would be in several processes."""
    server = warm.server("llamafactory.train.tuner")
    path = write(
        tmp_path / "run.yaml",
        tiny,
        pref_loss="sigmoid",
        val_size=0.25,
        cutoff_len=32,
        deepspeed="z.json",
    )
    out = mi(path, "--output", tmp_path / "out", server=server)
    assert sorted(int(count) for count, _, _ in COUNTS.findall(out)) == [8, 24]
    rows = rows_of(tiny)
    found = pairs(tmp_path / "out")
    assert len({pair["row"] for pair in found}) == len(found)
    for pair in found:  # the prompt may be cut too
        assert pair["label"] == rows[pair["row"]]["query_type"]
        for side in ("chosen", "rejected"):
            assert rows[pair["row"]][side]["content"].startswith(pair[side])
    assert any(len(p["chosen"]) < len(rows[p["row"]]["chosen"]["content"]) for p in found)
