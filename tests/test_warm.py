"""Warm processes are what cold ones are, but for the imports."""

import os
import signal
import subprocess
import sys

import pytest
import warm


@pytest.fixture(scope="module")
def server():
    made = warm.Server("random", "numpy", "torch")
    yield made
    made.close()


@pytest.fixture
def both(server, tmp_path):
    """Run a command of Python in a cold and in a warm process: (exit status, output) of each."""

    def run(*words, **options):
        command = [sys.executable, *map(str, words)]
        cold = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        file = tmp_path / "warm.txt"
        with file.open("w") as output:
            status = server.start(command, stdout=output, **options).wait(60)
        return (cold.returncode, cold.stdout), (status, file.read_text())

    return run


HERE = "import os, sys; print(sys.argv, sys.path[0], __name__, os.getcwd(), os.environ['MINE'])\n"


def test_command_line_environment_and_folder(both, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "module.py").write_text(HERE)
    (tmp_path / "script").write_text(f"#!/usr/bin/env python\n{HERE}")
    given = {"cwd": tmp_path / "work", "env": os.environ | {"MINE": "yes"}}
    for words in (["-c", HERE], ["-m", "module"], [tmp_path / "script"]):
        cold, warm = both(*words, "one", "--two", **given)
        assert warm == cold
        assert cold[0] == 0
        assert "__main__" in cold[1]


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit('a message')",
        "os._exit(4)",
        "os.kill(os.getpid(), 9)",
        "atexit.register(print, 'late'); threading.Timer(0.1, print, ['from a thread']).start()",
        "subprocess.run(['echo', 'from a child']); sys.exit(3)",
    ],
)
def test_ends_as_a_cold_process(both, end):
    code = f"import atexit, os, subprocess, sys, threading; print('begun', flush=True); {end}"
    cold, warm = both("-c", code)
    assert warm == cold
    assert "begun" in cold[1]


def test_an_exception_is_a_traceback_and_status_1(both):
    for status, shown in both("-c", "def f(): 1 / 0\nf()"):
        assert status == 1
        assert shown.startswith("Traceback")
        assert shown.endswith("ZeroDivisionError: division by zero\n")


def test_random_states_differ_from_process_to_process(both):
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1))"
    shown = [out.split(" ", 2) for _ in range(2) for _, out in both("-c", code)]
    for numbers in zip(*shown, strict=True):
        assert len(set(numbers)) == 4


def test_modules_are_there_and_nothing_else_is_shared(server, tmp_path):
    code = "import sys; print('torch' in sys.modules); sys.modules['torch'].mine = 1"
    check = "import torch; print(hasattr(torch, 'mine'))"
    for number, source in enumerate((code, check)):
        with (tmp_path / f"{number}").open("w") as output:
            assert server.start([sys.executable, "-c", source], stdout=output).wait(60) == 0
    assert [(tmp_path / f"{i}").read_text() for i in range(2)] == ["True\n", "False\n"]


def test_a_process_is_killed_with_what_it_started(server, tmp_path):
    code = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(600)"
    with (tmp_path / "out").open("w") as output:
        process = server.start([sys.executable, "-c", code], stdout=output)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    while len(pids := (tmp_path / "out").read_text().split()) < 2:
        pass
    assert str(process.pid) in pids
    process.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL
    process.kill()  # nothing to be done, and nobody else is hit


def test_ranks(server, tmp_path):
    code = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(total)\n"
        "import os\n"  # in one write: the two share the file
        "told = (total.item(), dist.get_world_size(), dist.is_torchelastic_launched())\n"
        "os.write(1, f'{told}\\n'.encode())\n"
        "dist.destroy_process_group()"
    )
    command = [sys.executable, "-c", code]
    with (tmp_path / "out").open("w") as output:
        ranks = server.ranks(2, command, env=dict(os.environ), stdout=output)
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert (tmp_path / "out").read_text().split("\n") == ["(3, 2, True)", "(3, 2, True)", ""]


@pytest.mark.parametrize("name", ["BDPO_AUTOLOAD", "HF_HOME", "PYTHONPATH"])
def test_what_is_read_at_import_is_refused(server, name, tmp_path):
    changed = os.environ | {name: "another"}
    with (tmp_path / "out").open("w") as output, pytest.raises(ValueError, match=f"{name} is read"):
        server.start([sys.executable, "-c", ""], env=changed, stdout=output)


def test_a_server_that_cannot_import_says_so(tmp_path):
    server = warm.Server("no_such_module")
    with (tmp_path / "out").open("w") as output, pytest.raises((RuntimeError, OSError)):
        server.start([sys.executable, "-c", ""], stdout=output)
