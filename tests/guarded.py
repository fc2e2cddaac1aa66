"""Runs a command under a guard that notes what it writes and refuses it the network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import datasets
import huggingface_hub
import matplotlib
from commandline import bdpo
from guard import sitecustomize
from guard.sitecustomize import watching
from mi_runs import pairs

#: The first of PYTHONPATH of a new process that is to be watched.
GUARD = Path(sitecustomize.__file__).parent

#: Variables of the tests by which nothing reports: a command that only looks sets its own.
QUIET = ("AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK", "WANDB_DISABLED", "WANDB_MODE")


def value_of(annotation: Any, name: str) -> Any:
    """A value that a key of this type may have, which would have an effect."""
    for kind in get_args(annotation) or (annotation,):
        if get_origin(annotation) is Literal:
            return kind
        if get_origin(kind) is Literal:
            return get_args(kind)[0]
        plain = {bool: True, int: 1, float: 0.5, str: f"a-{name}", dict: {}, list: []}
        if (get_origin(kind) or kind) in plain:
            return plain[get_origin(kind) or kind]
    return f"a-{name}"


def files(folder: Path) -> set[Path]:
    """All files in a folder, of any depth."""
    return {path for path in folder.rglob("*") if not path.is_dir()}


def cold(*command: str) -> str:
    """What a command prints, run by a new process of this environment."""
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextmanager
def nothing_but(folder: Path, *allowed: Path, monkeypatch: Any) -> Iterator[None]:
    """Asserts that nothing is asked of the network and nothing written but the files allowed, the
    store of scores and the caches of libraries: those of Hugging Face and matplotlib.

    Args:
        folder: with all that the command is given; the home, the temporary files and the folder
            that it is called in are made in it.
        allowed: files, or folders with whatever is in them.
    """
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    for name in ("home/.config", "tmp", "here"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder / "here")
    # a look at the hub is to be seen, not refused by a library
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    # in a new process our own command says so, before datasets is imported
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False, raising=False)
    path = f"{GUARD}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    elsewhere = folder / "notes"
    for name, value in (("PYTHONPATH", path), ("BDPO_GUARD", elsewhere), ("HF_HUB_OFFLINE", "0")):
        monkeypatch.setenv(name, str(value))
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.mkdir(exist_ok=True)
    caches = (
        Path(datasets.config.HF_CACHE_HOME).expanduser(),
        Path(datasets.config.HF_DATASETS_CACHE),
        Path(huggingface_hub.constants.HF_HUB_CACHE),
        *(cache / name for name in ("bdpo", "huggingface", "matplotlib")),
        folder / "home" / ".config" / "matplotlib",
        Path(matplotlib.get_configdir()),
        Path(matplotlib.get_cachedir()),
    )
    before = files(folder)
    with watching() as notes:
        yield
    notes += elsewhere.read_text().splitlines() if elsewhere.exists() else []
    elsewhere.unlink(missing_ok=True)
    # the lines that ran, which a run of all the tests notes
    lines = (Path(os.environ["BDPO_LINES"]),) if "BDPO_LINES" in os.environ else ()
    inside = (*allowed, *caches, *lines, folder / "tmp", elsewhere)
    if found := other(notes, inside):
        raise AssertionError("\n".join(found))
    written = files(folder) - before
    kept = {path for path in written if _within(path, (*allowed, *caches))}
    # what datasets removes when the process ends
    left = {path for path in written - kept if "hf_datasets-" not in str(path)}
    if left:
        raise AssertionError(f"left behind: {sorted(map(str, left))}")


def other(notes: Iterable[str], allowed: Iterable[Path]) -> list[str]:
    """The notes of what is not allowed; compiled Python and devices are."""
    return [
        note
        for note in notes
        if note.startswith("network: ")
        or not (
            "__pycache__" in note
            or "/torchinductor_" in note  # which torch makes when it is imported
            or note.startswith("writes: /dev/")
            or _within(Path(note.removeprefix("writes: ")), allowed)
        )
    ]


def _within(path: Path, folders: Iterable[Path]) -> bool:
    return any(path == folder or folder in path.parents for folder in folders)


def mi_of_two_sets(
    path: Path, folder: Path, monkeypatch: Any, splits: Iterable[str], sets: Iterable[str]
) -> None:
    """Asserts that `bdpo mi` takes two sets of eight pairs, and writes nothing but its folder.

    Args:
        path: of the configuration, in `folder`.
        splits: the names of the files of pairs.
        sets: the names of the sets on the page.
    """
    out = folder / "bdpo-mi"
    with nothing_but(folder, out, monkeypatch=monkeypatch):
        code, shown = bdpo("mi", str(path), "--json", "--split", "balanced", "--fraction", "1")
    assert code == 0, shown
    names = {file.name for file in out.rglob("*") if file.is_file()}
    assert names == {"mi.png", "mi.html", "reference_scores.parquet", *splits}
    found = pairs(out)
    assert len(found) == 16
    assert {pair["set"] for pair in found} == {*sets}
    for of in sets:  # each pair with the row of its own set
        assert sorted(pair["row"] for pair in found if pair["set"] == of) == list(range(8))
