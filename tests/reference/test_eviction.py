"""Scores that nobody uses go by age, then by size; nothing in use, and nothing of others."""

import os
import time

import numpy as np
import pytest

from bdpo_plugin.reference import eviction
from bdpo_plugin.reference.eviction import AGE, DAY, IN_USE, evict
from bdpo_plugin.reference.store import ASIDE, KEY, ScoreStore


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def made(cache, name, *, days=0.0, scores=10):
    """The folder of a reference of that name, which was last used so many days ago."""
    store = ScoreStore(cache, [name])
    rng = np.random.default_rng(0)
    keys = np.sort(np.frombuffer(rng.bytes(16 * scores), KEY))
    store.add(keys, rng.normal(size=(scores, 1)))
    return used(store.path, days)


def used(folder, days):
    then = time.time() - days * DAY
    os.utime(folder, (then, then))
    return folder


def there(*folders):
    return [folder.exists() for folder in folders]


def test_by_age(cache):
    old, young = made(cache, "old", days=AGE / DAY + 1), made(cache, "young", days=AGE / DAY - 1)
    aside = made(cache, "aside")
    aside = used(aside.rename(f"{aside}{ASIDE}01234567"), AGE / DAY + 1)
    evict(cache)
    assert there(old, young, aside) == [False, True, False]


def test_by_size_the_least_recently_used_first(cache, monkeypatch):
    folders = [made(cache, str(days), days=days, scores=1000) for days in (9, 2, 30, 4)]
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    monkeypatch.setattr(eviction, "SIZE", 2.5 * size)
    evict(cache)
    assert there(*folders) == [False, True, False, True]


def test_what_is_in_use_stays(cache, monkeypatch):
    monkeypatch.setattr(eviction, "SIZE", 0)
    mine = made(cache, "mine", days=400)
    theirs = made(cache, "theirs", days=0.9 * IN_USE / DAY)
    rest = made(cache, "rest", days=1.1 * IN_USE / DAY)
    evict(cache, keep=mine)
    assert there(mine, theirs, rest) == [True, True, False]


def test_a_run_that_only_reads_uses(cache):
    folder = made(cache, "read", days=AGE / DAY + 1)
    ScoreStore(cache, ["read"]).mark_as_used()
    evict(cache)
    assert folder.exists()
    ScoreStore(cache, ["never written"]).mark_as_used()
    ScoreStore(None, None).mark_as_used()


def test_what_begins_to_be_used_meanwhile_stays(cache, monkeypatch):
    folder = made(cache, "a", days=400)
    stored = eviction._stored

    def then_used(*args):
        found = list(stored(*args))
        ScoreStore(cache, ["a"]).mark_as_used()
        return found

    monkeypatch.setattr(eviction, "_stored", then_used)
    evict(cache)
    assert folder.exists()


OTHERS = {
    "another name": lambda folder: folder.rename(folder.parent / "model"),
    "longer": lambda folder: folder.rename(f"{folder}0"),
    "upper case": lambda folder: folder.rename(
        folder.parent / folder.name.upper().replace("0", "A")
    ),
    "a file beside": lambda folder: (folder / "notes.txt").write_text("mine") and folder,
    "a table of theirs": lambda folder: (folder / "data.parquet").write_text("mine") and folder,
    "a folder within": lambda folder: (folder / f"{'0' * 32}.parquet").mkdir() or folder,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_ours_stays_whole(cache, monkeypatch, other):
    monkeypatch.setattr(eviction, "SIZE", 0)
    folder = OTHERS[other](made(cache, "a"))
    used(folder, 400)
    before = sorted(folder.iterdir())
    evict(cache)
    assert sorted(folder.iterdir()) == before


def test_links_and_what_is_no_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "SIZE", 0)
    real = made(tmp_path / "elsewhere", "real", days=400)
    cache.mkdir()
    (cache / ("a" * 32)).symlink_to(real)
    (cache / ("b" * 32)).write_text("a file")
    evict(cache)
    evict(tmp_path / "nowhere")
    assert sorted(path.name[0] for path in cache.iterdir()) == ["a", "b"]
    assert list(real.iterdir())


def test_all_kinds_of_files_of_a_store_go_with_it(cache):
    folder = made(cache, "a")
    (file,) = folder.iterdir()
    file.with_name(f".{'0' * 32}.tmp").write_bytes(b"")
    file.with_name(f"{'1' * 32}.parquet").write_bytes(b"of an earlier release")
    used(folder, 400)
    evict(cache)
    assert not folder.exists()
