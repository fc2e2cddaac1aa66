"""The formula for memory is near to measured peaks, in training and in the reference pass."""

import itertools
import json
from importlib.util import find_spec

import pytest
from cases import first
from click.testing import CliRunner

from benchmarks import memory

BESIDE_TRL = pytest.mark.skipif(
    bool(find_spec("axolotl") or find_spec("llamafactory")),
    reason="is the same in every environment: it runs beside TRL alone",
)


#: Three models, each trained in another way, come first.
FIRST = [*zip(memory.MODELS, list(memory.WAYS)[1:], strict=True)]
REST = [c for c in itertools.product(memory.MODELS, memory.WAYS) if c not in FIRST]


@BESIDE_TRL
@pytest.mark.parametrize(("model", "way"), first(3, [*FIRST, *REST]))
def test_the_formula_is_within_15_percent_of_what_is_measured(model, way) -> None:
    found = memory.peaks(model, memory.WAYS[way])
    assert found.ratio == pytest.approx(1, abs=0.15)
    assert found.scoring_ratio == pytest.approx(1, abs=0.15)


@BESIDE_TRL
def test_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "peaks", lambda *_: memory.Peaks(1, 2, 3, 4))
    done = CliRunner().invoke(memory.main, ["--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == len(memory.MODELS) * len(memory.WAYS)
    assert results[0]["measured"] == 2
