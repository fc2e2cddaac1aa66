"""Two real processes (torchrun, gloo) against one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import scores

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_processes.py")
HOSTS = ["", *(["axolotl"] if importlib.util.find_spec("axolotl") else [])]


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("host", HOSTS)
def test_two_processes_are_one(tmp_path, host):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(SCRIPT, tmp_path / "one", host)
    out = run(*torchrun, SCRIPT, tmp_path / "two", host)
    assert out.count("identical (dropped; rows 7)") == 1  # told once, dropped in both

    for file, rows in (("reference_scores.parquet", 24), ("reference_scores.eval.parquet", 5)):
        one, two = scores(tmp_path / "one", file), scores(tmp_path / "two", file)
        assert len(one["row"]) == rows
        for name, column in one.items():
            assert two[name] == pytest.approx(column, rel=1e-6, abs=1e-5), name

    histories = []
    for directory in ("one", "two"):
        state = json.loads((tmp_path / directory / "checkpoint-4/trainer_state.json").read_text())
        histories.append(state["log_history"])
    compared = 0
    for one, two in zip(*histories, strict=True):
        names = set(one) & set(two)
        if one["step"] == 1:  # nothing is trained yet: a reward above 0 is one of rounding
            names.discard("rewards/accuracies")
        for name in names:
            if name.startswith(("rewards/", "bdpo/", "loss", "logps/", "num_tokens", "entropy")):
                assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-4), name
                compared += 1
    assert compared >= 4 * 12
