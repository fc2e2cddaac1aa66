"""Two runs do not write into one output folder, and nothing of the lock is in that folder."""

import gc
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest

from bdpo_plugin import BDPOError
from bdpo_plugin.training.output_lock import lock_output

FORK = multiprocessing.get_context("fork")


def _hold(folder, held, done):
    kept = lock_output(folder)
    held.set()
    done.wait(60)
    del kept


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder `run`."""
    held, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path / "run", held, done))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_until_the_first_has_died(tmp_path, other):
    words = rf"Another B-DPO run has .*/run \(process {other.pid} on {socket.gethostname()}\)"
    with pytest.raises(BDPOError, match=words):
        lock_output(tmp_path / "run")
    (tmp_path / "run").mkdir()
    link = tmp_path / "link"
    link.symlink_to("run")
    with pytest.raises(BDPOError, match="Another B-DPO run"):
        lock_output(link)
    free = lock_output(tmp_path / "other")
    other.kill()  # as by a crash
    other.join()
    assert lock_output(link) is lock_output(tmp_path / "run") is not free
    assert list((tmp_path / "run").iterdir()) == []


def _tries(folder, said):
    try:
        lock_output(folder)
        said.put("taken")
    except BDPOError as error:
        said.put(str(error))


def tried(folder):
    """What a forked child is told that wants the folder."""
    said = FORK.Queue()
    child = FORK.Process(target=_tries, args=(folder, said))
    child.start()
    told = said.get(timeout=60)
    child.join()
    return told


def test_it_lasts_as_long_as_one_of_its_trainers(tmp_path):
    folder = tmp_path / "run"
    first, second = lock_output(folder), lock_output(folder)
    for file in (tmp_path / "cache" / "bdpo" / "locks").iterdir():
        os.close(os.open(file, os.O_RDONLY))  # which lets go of a lock of POSIX
    del first
    gc.collect()
    assert "Another B-DPO run" in tried(folder)
    assert "Another B-DPO run" in tried(folder)  # the end of a child is not that of its parent
    del second
    gc.collect()
    assert tried(folder) == "taken"


@pytest.mark.parametrize("what", ["a file", "no home"])
def test_a_run_goes_on_where_nothing_can_be_locked(tmp_path, monkeypatch, capsys, what):
    if what == "a file":  # in the place of the cache directory: it is not writable even for root
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    assert lock_output(tmp_path / "run") is None
    # however its lines are wrapped
    told = "".join(capsys.readouterr().out.replace("│", "").split())
    assert told.count("cannotbelocked") == 1


def _no_home():
    raise RuntimeError("Could not determine home directory.")
