"""Small versions of soak: what it finds is in docs/reliability.md."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2]))

from soak import kills, small
from soak.processes import Run, Warm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def warm():
    return Warm()


def test_three_kills_leave_no_trace(warm, tmp_path, monkeypatch):
    """In the pass, in training and while it saves: the run ends as the undisturbed one."""
    options = {
        "pairs": 32,
        "max_steps": kills.STEPS,
        "save_strategy": "steps",
        "save_steps": kills.SAVE_STEPS,
        "bdpo_score_tokens": 512,
    }
    whole = kills.Undisturbed(warm, Run(tmp_path / "whole", options, pause=0.05))
    phases = ["pass", "saving", "training"]
    life = kills.live(
        warm, whole, "TRL, LoRA", tmp_path / "killed" / "run", phases, random.Random(0)
    )
    assert not life.faults
    assert life.kills[0].phase in ("pass", "store")
    assert len(life.kills) >= 2  # the last phase may be over before the last kill
    assert life.differences.keys() == kills.TOLERANCE.keys()


def test_what_is_compared_is_seen(tmp_path):
    assert small.largest_difference({"a": [1.0, 2.0]}, {"a": [1.0, 2.5]}) == 0.5
    with pytest.raises(ValueError, match="not the same names"):
        small.largest_difference({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="beside"):
        small.largest_difference({"a": [1.0]}, {"a": [1.0, 2.0]})
