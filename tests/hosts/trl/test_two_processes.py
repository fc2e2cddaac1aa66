"""Two real processes (gloo) against one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from real_runs import run_command, run_ranks
from running import scores

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_processes.py")
FAILING = Path(__file__).with_name("failing_writes.py")
HOSTS = ["", *(["axolotl"] if importlib.util.find_spec("axolotl") else [])]


def run(processes, directory, host, script=SCRIPT):
    """The output; beside Axolotl the processes are warm, and else torchrun's own."""
    command = [sys.executable, str(script), str(directory), *([host] if script == SCRIPT else [])]
    server = None
    if host:
        from axolotl_runs import server as server_of_axolotl

        server = server_of_axolotl()
    if processes == 1:
        return run_command(command, {}, server).stdout
    if server:
        return run_ranks(server, processes, command)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run_command([command[0], *torchrun, *command[1:]], {}).stdout


@pytest.mark.parametrize("host", HOSTS)
def test_two_processes_are_one(tmp_path, host):
    run(1, tmp_path / "one", host)
    out = run(2, tmp_path / "two", host)
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


def test_where_the_main_process_cannot_write_all_stop(tmp_path):
    out = run(2, tmp_path, HOSTS[-1], FAILING)
    for file, words in (
        ("reference_scores.parquet", "could not write"),
        ("run.json", "could not write its record into"),
        ("recipe.yml", "could not write its record into"),
    ):
        assert f"rank 0, {file}: This run {words} {tmp_path}" in out
        assert f"rank 1, {file}: Rank 0 of this run could not go on. This run {words}" in out
