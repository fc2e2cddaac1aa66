"""A reference whose weights cannot be read is scored all the same, and its scores are not kept."""

import re

import pytest
import torch
from running import history, pairs, scores, sharp_model, trainer


@pytest.fixture
def unreadable():
    """A model one of whose buffers, which does nothing, has no content that can be read."""
    model = sharp_model()
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    model.register_buffer("codes", quantised, persistent=False)
    return model


def test_a_reference_that_cannot_be_told_from_others(tmp_path, capsys, unreadable):
    evaluation = {"small": pairs(6, seed=1)}
    known = trainer(
        output_dir=tmp_path / "known", evaluation=evaluation, bdpo_cache_dir=str(tmp_path / "kept")
    )
    assert list(tmp_path.joinpath("kept").rglob("*.parquet"))
    capsys.readouterr()
    made = trainer(
        output_dir=tmp_path / "run",
        evaluation=evaluation,
        model=unreadable,
        bdpo_cache_dir=str(tmp_path / "cache"),
    )
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert out.count("scores are used by this run alone") == 1
    assert re.search(r"weight '\S*codes', a Tensor of torch.qint8, cannot be read", out)
    assert not list(tmp_path.joinpath("cache").rglob("*.parquet"))
    for file in ("reference_scores.parquet", "reference_scores.small.parquet"):
        found, wanted = scores(tmp_path / "run", file), scores(tmp_path / "known", file)
        assert found["row"] == wanted["row"]
        for column in found:
            assert found[column] == pytest.approx(wanted[column], abs=1e-4), column
    known.train()
    made.train()
    assert history(made, "loss") == pytest.approx(history(known, "loss"), abs=1e-4)
