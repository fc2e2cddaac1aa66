"""The scores on disk: whole or not there, found again by content, and no run ends for them."""

import multiprocessing
import os
import resource
import stat
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import stored

from bdpo_plugin.reference import store as store_module
from bdpo_plugin.reference.required_scores import score_key
from bdpo_plugin.reference.scoring import ScoreRequest
from bdpo_plugin.reference.store import KEY, ScoreStore, default_cache_dir

IDENTITY = ["model", "tokenizer"]


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores", IDENTITY)


def some_scores(n, seed=0, columns=2):
    """(n,) keys, sorted, and (n, columns) scores."""
    rng = np.random.default_rng(seed)
    return np.sort(np.frombuffer(rng.bytes(16 * n), KEY)), rng.normal(-50, 20, (n, columns))


def joined(*parts):
    """Keys and scores together, sorted by key."""
    keys, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys)
    return keys[order], scores[order]


def found(store, keys):
    """(n, 2) what the store has for these keys, in a row that is nan where it has nothing."""
    scores = np.full((len(keys), 2), np.nan)
    places, values = store.read(keys)
    scores[places] = values
    return scores


def holds(store, keys, scores):
    return np.array_equal(found(store, keys)[:, : scores.shape[1]], scores)


def reported(store):
    """What the user is shown, in one piece."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        store.tell(store.problems)
        store.tell(store.problems)  # no second time
    assert len(shown) <= 1
    return "".join(str(warning.message) for warning in shown)


# --- what is written is read -----------------------------------------------------------------


def test_what_is_added_is_read(store):
    first, second = some_scores(20, 1), some_scores(5, 2)
    keys, scores = joined(first, second)
    assert np.isnan(found(store, keys)).all()
    assert store.add(*first)
    assert store.add(*second)
    assert holds(store, keys, scores)
    assert holds(ScoreStore(store.path.parent, IDENTITY), keys, scores)
    assert not reported(store)


def test_only_what_is_wanted(store):
    keys, scores = some_scores(50)
    other, _ = some_scores(7, seed=1)
    store.add(keys, scores)
    assert holds(store, keys[10:20], scores[10:20])
    assert [len(part) for part in store.read(other)] == [0, 0]
    assert [len(part) for part in store.read(keys[:0])] == [0, 0]
    assert np.isnan(found(store, joined((keys, scores), some_scores(7, 1))[0])).sum() == 2 * 7


def test_only_the_files_that_are_named(store):
    first, second = some_scores(5, 1), some_scores(5, 2)
    store.add(*first)
    (name,) = store.names()
    store.add(*second)
    keys, _ = joined(first, second)
    places, values = store.read(keys, [name])
    assert np.array_equal(keys[places], first[0])
    assert np.array_equal(values, first[1])


def test_keys_of_any_bytes(store):
    """Zeros at the end of a key are part of it."""
    keys = np.frombuffer(
        bytes(16) + bytes(15) + b"\1" + b"a" + bytes(15) + b"ab" + bytes(14) + b"\xff" * 16, KEY
    )
    scores = np.arange(10.0).reshape(5, 2)
    store.add(keys, scores)
    assert holds(store, keys, scores)
    assert all(len(key) == 16 for key in stored(store))


def test_a_score_without_gain(store):
    keys, scores = some_scores(3, columns=1)
    store.add(keys, scores)
    assert holds(store, keys, scores)
    assert np.isnan(found(store, keys)[:, 1]).all()
    assert [gain for _, gain in stored(store).values()] == [None] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_what_is_not_finite_is_not_kept(store, bad, column):
    keys, scores = some_scores(4)
    scores[2, column] = bad
    assert store.add(keys, scores)
    assert stored(store).keys() == {key.ljust(16, b"\0") for key in keys[[0, 1, 3]].tolist()}


def test_nothing_to_add_makes_no_file(store):
    assert store.add(*some_scores(0))
    assert store.add(some_scores(1)[0], np.array([[np.nan]]))
    assert not store.path.parent.exists()


def test_a_store_of_an_earlier_release_is_read(store):
    """Its files have no run in their names."""
    keys, scores = some_scores(6)
    store.add(keys, scores)
    (file,) = store.path.iterdir()
    file.rename(file.with_name(file.name.partition("-")[0] + ".parquet"))
    assert holds(store, keys, scores)


# --- a store that is not whole ---------------------------------------------------------------


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not parquet": lambda content: b"hello",
    "flipped": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
}


def as_written(table):
    """A file of a store, by its name, with other content."""
    pq.write_table(table, sink := pa.BufferOutputStream())
    content = sink.getvalue().to_pybytes()
    return store_module._hash(content) + ".parquet", content


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_not_used(store, damage):
    good, bad = some_scores(5, 1), [some_scores(30, seed) for seed in (2, 3, 4)]
    for part in bad:
        store.add(*part)
    files = [*store.path.iterdir()]
    for file in files:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    store.add(*good)
    keys, scores = joined(good, *bad)
    for _ in range(2):
        assert np.isnan(found(store, keys)).all(axis=1).sum() == 90
        assert holds(store, *good)
    message = reported(store)
    assert all(file.name in message for file in files), "all of them at once"
    assert f"3 files in {store.path}: damaged and not used" in message
    assert "bdpo_cache_dir" in message
    again = ScoreStore(store.path.parent, IDENTITY)
    assert holds(again, *good)
    for part in bad:
        again.add(*part)
    assert holds(again, keys, scores)


def test_no_flipped_bit_goes_unnoticed(store):
    keys, scores = some_scores(30)
    store.add(keys, scores)
    (file,) = store.path.iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert [len(part) for part in store.read(keys)] == [0, 0]
    file.write_bytes(whole)
    assert holds(store, keys, scores)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"text": ["a", "b"]}),
        pa.table({"key": [b"0" * 16], "logps": [1.0], "gain": ["x"]}),
        pa.table({"key": [None], "logps": [1.0], "gain": [1.0]}, schema=store_module._SCHEMA),
        pa.table({"key": [b"0" * 16], "logps": [1.0], "gain": [1.0], "more": [1]}),
    ],
    ids=["others", "types", "no key", "more"],
)
def test_a_foreign_table_is_not_used(store, table):
    """Even one whose name is the hash of its content."""
    good = some_scores(3)
    store.add(*good)
    name, content = as_written(table)
    (store.path / name).write_bytes(content)
    assert holds(store, *good)
    assert f"{store.path / name}: damaged" in reported(store)


def test_a_table_without_rows_gives_none(store):
    keys, _ = some_scores(2)
    store.path.mkdir(parents=True)
    name, content = as_written(
        pa.table({"key": [], "logps": [], "gain": []}, schema=store_module._SCHEMA)
    )
    (store.path / name).write_bytes(content)
    assert [len(part) for part in store.read(keys)] == [0, 0]
    assert not reported(store)


THINGS = {
    "folder": lambda path: (path.mkdir(), (path / "inside").touch()),
    "pipe": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path),
    "link to a folder": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_file_is_no_score(store, thing):
    good = some_scores(4)
    store.add(*good)
    path = store.path / "x.parquet"
    THINGS[thing](path)
    assert holds(store, *good)
    assert str(path) in reported(store)
    assert store.add(*some_scores(4, 2))


def test_a_file_that_goes_while_it_is_read_is_no_problem(store):
    good = some_scores(4)
    store.add(*good)
    places, _ = store.read(good[0], [*store.names(), "gone.parquet"])
    assert len(places) == 4
    assert not reported(store)


# --- a store that cannot be used -------------------------------------------------------------


@contextmanager
def full_disk(limit=100):
    """No file may grow beyond `limit` bytes; what is written up to there stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing_and_is_told_once(store):
    good, more = some_scores(4), some_scores(4, 9)
    store.add(*good)
    with full_disk():
        assert not store.add(*more)
        assert not store.add(*more)
    assert len([*store.path.iterdir()]) == 1
    message = reported(store)
    assert f"{store.path}: cannot be written (File too large)." in message
    assert message.count("cannot be written (") == 1
    assert "bdpo_cache_dir" in message
    assert holds(store, *good)
    assert store.add(*more), "there is room again"
    assert holds(store, *joined(good, more))


@pytest.mark.parametrize("place", ["under a file", "dangling link", "a file", "null", "long"])
def test_a_folder_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    directory = {
        "under a file": tmp_path / "file" / "scores",
        "a file": tmp_path / "file",
        "dangling link": tmp_path / "link",
        "null": f"{tmp_path}/a\0b",
        "long": tmp_path / ("x" * 300),
    }[place]
    store = ScoreStore(directory, IDENTITY)
    keys, scores = some_scores(3)
    assert store.names() == []
    store.remove_leftovers()
    assert [len(part) for part in store.read(keys)] == [0, 0]
    assert not store.add(keys, scores)
    message = reported(store)
    assert str(store.path) in message
    assert "bdpo_cache_dir" in message


def in_process(do, user=None):
    """What `do` returns in a process of its own: of another user where this one is root."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run():
        if os.getuid() == 0:
            os.setgroups([])
            os.setuid(user)
        results.put(do())

    process = context.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return results.get()


@pytest.fixture
def shared(tmp_path):
    """A store whose folder every user may read, and none write; and its files."""
    for folder in (tmp_path, *tmp_path.parents):  # pytest's are the user's alone
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    store = ScoreStore(tmp_path, IDENTITY)
    store.add(*some_scores(4, 1))
    store.add(*some_scores(4, 2))
    for file in store.path.iterdir():
        file.chmod(0o444)
    store.path.chmod(0o555)
    yield store
    store.path.chmod(0o700)


def test_a_file_that_may_not_be_read(shared):
    """Its scores are computed again; told with what else may not be done, each once."""
    first, second = sorted(shared.path.iterdir())
    first.chmod(0)

    def use():
        store = ScoreStore(shared.path.parent, IDENTITY)
        everything = joined(some_scores(4, 1), some_scores(4, 2))[0]
        read = len(store.read(everything)[0])
        store.read(everything)
        return read, store.add(*some_scores(4, 3)), reported(store)

    read, added, message = in_process(use, 65534)
    assert (read, added) == (4, False)
    assert message.count("cannot be read (") == 1
    assert f"{first}: cannot be read (Permission denied)." in message
    assert f"{shared.path}: cannot be written (Permission denied)." in message
    assert str(second) not in message


def test_a_folder_that_may_not_be_read(shared):
    shared.path.chmod(0)

    def use():
        store = ScoreStore(shared.path.parent, IDENTITY)
        read = len(store.read(some_scores(4, 1)[0])[0])
        return read, store.add(*some_scores(4, 3)), reported(store)

    read, added, message = in_process(use, 65534)
    assert (read, added) == (0, False)
    assert f"{shared.path}: cannot be read (Permission denied)." in message


@pytest.mark.parametrize("directory", [None, "~a-user-who-is-not/scores"])
def test_a_user_without_a_home(monkeypatch, directory):
    if directory is None and os.getuid() != 0:
        pytest.skip("only root can become a user whom nobody knows")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)

    def use():
        store = ScoreStore(directory, IDENTITY)
        keys, scores = some_scores(3)
        store.remove_leftovers()
        return len(store.read(keys)[0]), store.add(keys, scores), store.path, reported(store)

    read, added, path, message = in_process(use, 54321)
    assert (read, added, path) == (0, False, None)
    assert "no folder to keep them in (Could not determine home directory" in message
    assert "bdpo_cache_dir" in message


# --- private, and tidy -----------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private_whatever_the_umask(tmp_path, umask):
    (tmp_path / "there").mkdir(mode=0o755)
    store = ScoreStore(tmp_path / "there" / "new" / "scores", IDENTITY)
    before = os.umask(umask)
    try:
        store.add(*some_scores(3))
    finally:
        os.umask(before)
    (file,) = store.path.iterdir()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (file, *file.parents)}
    assert modes[file] == 0o600
    assert modes[store.path] == modes[store.path.parent] == modes[tmp_path / "there/new"] == 0o700
    assert modes[tmp_path / "there"] == 0o755, "a folder that exists keeps its mode"


def test_on_the_disk_before_it_is_there(store, monkeypatch):
    """The file before it has its name, the folder after; as the system calls come."""
    calls = []

    def watched(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            what = args[0]
            if isinstance(what, int):
                what = os.readlink(f"/proc/self/fd/{what}")
            calls.append((name, os.path.basename(what)))
            return real(*args, **kwargs)

        return call

    store.path.mkdir(parents=True)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    store.add(*some_scores(3))
    (temporary,) = {what for name, what in calls if name == "replace"}
    assert (temporary[0], temporary[-4:]) == (".", ".tmp")
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", store.path.name)]


def test_leftovers_of_killed_runs_are_removed(store):
    good = some_scores(4)
    store.add(*good)
    old, new = store.path / ".0123.tmp", store.path / ".4567.tmp"
    for file in (old, new):
        file.write_bytes(b"PAR1")
    os.utime(old, (time.time() - 7200,) * 2)
    store.remove_leftovers()
    assert new.exists(), "it may be being written"
    assert not old.exists()
    assert holds(store, *good)


# --- several at once -------------------------------------------------------------------------


def _write(directory, seed):
    store = ScoreStore(directory, IDENTITY)
    for i in range(5):
        store.add(*some_scores(10, 100 * seed + i))
        store.read(some_scores(10, 100)[0])
    assert not store.problems


def test_several_processes_write_at_once(store):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(store.path.parent, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    keys, scores = joined(*(some_scores(10, 100 * seed + i) for seed in range(4) for i in range(5)))
    assert holds(store, keys, scores)
    assert not list(store.path.glob(".*"))


def _write_and_tidy(directory, seed):
    store = ScoreStore(directory, IDENTITY)
    for i in range(5):
        store.add(*some_scores(10, 100 * seed + i))
        store.make_one_file()
    assert not store.problems


def test_several_processes_make_one_file_at_once(store):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_write_and_tidy, args=(store.path.parent, i)) for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    keys, scores = joined(*(some_scores(10, 100 * seed + i) for seed in range(4) for i in range(5)))
    assert holds(store, keys, scores)
    store.make_one_file()
    assert len(store.names()) == 1
    assert holds(store, keys, scores)


# --- one file in the end ---------------------------------------------------------------------


def test_all_files_become_one(store):
    parts = [some_scores(9, seed) for seed in range(5)]
    alone = some_scores(4, 7, columns=1)
    for part in (*parts, alone, parts[0]):  # some twice, as two runs may write them
        store.add(*part)
    other = ScoreStore(store.path.parent, IDENTITY)
    other.add(*parts[0])
    files = store.names()
    store.make_one_file()
    assert len(store.names()) == 1
    assert not set(store.names()) & set(files)
    assert holds(store, *joined(*parts))
    assert [len(part) for part in store.read(np.sort(parts[0][0]))] == [9, 9], "each once"
    assert sum(gain is None for _, gain in stored(store).values()) == 4
    before = store.names()
    store.make_one_file()
    assert store.names() == before
    assert not reported(store)


def test_what_cannot_be_read_is_not_lost(store):
    parts = [some_scores(9, seed) for seed in range(3)]
    for part in parts:
        store.add(*part)
    bad = store.path / store.names()[0]
    bad.write_bytes(b"")
    store.make_one_file()
    assert len(store.names()) == 2
    assert np.isfinite(found(store, joined(*parts)[0])[:, 0]).sum() == 18
    assert f"{bad}: damaged" in reported(store)
    assert bad.exists(), "only the user deletes it"


@pytest.mark.parametrize("at", ["write", "remove"])
def test_a_run_that_dies_while_it_makes_one_file_loses_nothing(store, monkeypatch, at):
    parts = [some_scores(9, seed) for seed in range(3)]
    for part in parts:
        store.add(*part)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace" if at == "write" else "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            store.make_one_file()
    again = ScoreStore(store.path.parent, IDENTITY)
    assert holds(again, *joined(*parts))
    again.make_one_file()
    assert len(again.names()) == 1
    assert holds(again, *joined(*parts))


def test_a_full_disk_leaves_the_files_as_they_are(store):
    parts = [some_scores(9, seed) for seed in range(3)]
    for part in parts:
        store.add(*part)
    files = store.names()
    with full_disk():
        store.make_one_file()
    assert sorted(store.names()) == sorted(files)
    assert "cannot be written" in reported(store)


# --- names and keys --------------------------------------------------------------------------


def test_one_directory_for_each_identity(tmp_path):
    identities = [("a", "b"), ("a", "c"), ("b", "a"), ("a",), ()]
    paths = {ScoreStore(tmp_path, identity).path for identity in identities}
    assert len(paths) == len(identities)
    assert {path.parent for path in paths} == {tmp_path}


def test_the_default_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert ScoreStore(None, ["a"]).path.parent == default_cache_dir() == tmp_path / "x" / "bdpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "bdpo"
    assert ScoreStore("~/scores", ["a"]).path.parent == tmp_path / "home" / "scores"


@pytest.mark.parametrize("name", ["with space", "a=1", "ünïcode", "[0-9]*", "50%20?"])
def test_a_directory_of_any_name(tmp_path, name):
    scores = some_scores(3)
    store = ScoreStore(tmp_path / name, ["a"])
    store.add(*scores)
    assert holds(store, *scores)


@pytest.mark.parametrize("field", ["prompt", "null", "response"])
@pytest.mark.parametrize("change", ["value", "longer", "shorter", "order"])
def test_every_field_counts(field, change):
    ids = {"prompt": [5, 6, 7], "null": [5, 9], "response": [8, 9, 10]}
    changed = dict(ids)
    changed[field] = {
        "value": [*ids[field][:-1], 11],
        "longer": [*ids[field], 0],
        "shorter": ids[field][:-1],
        "order": ids[field][::-1],
    }[change]
    assert key_of(**ids) != key_of(**changed)


def key_of(prompt, null, response, dtype=np.int64):
    prompt, null, response = (
        None if ids is None else np.array(ids, dtype) for ids in (prompt, null, response)
    )
    return score_key(ScoreRequest(prompt, response, null))


tokens = st.lists(st.integers(0, 3), max_size=4)
jobs = st.tuples(tokens, st.none() | tokens, tokens)


@given(first=jobs, second=jobs)
def test_keys_are_equal_for_equal_jobs_only(first, second):
    assert (key_of(*first) == key_of(*second)) == (first == second)


@given(jobs, st.integers(0, 4))
def test_a_token_that_moves_across_a_boundary_changes_the_key(job, at):
    prompt, null, response = job
    whole = [*prompt, *response]
    moved = (whole[:at], null, whole[at:])
    assert (key_of(*job) == key_of(*moved)) == (len(prompt) == min(at, len(whole)))


def test_the_integer_type_does_not_count():
    assert key_of([1, 2], [3], [4], np.int32) == key_of([1, 2], [3], [4], np.int64)
    ids = np.arange(10)
    keys = [score_key(ScoreRequest(prompt, ids)) for prompt in (ids[::2], ids[::2].copy())]
    assert keys[0] == keys[1]


def test_large_token_ids():
    assert key_of([2**31], None, [1]) != key_of([0], None, [1])


def test_keys_stay_what_they_are():
    """Or everything that is stored would be computed again."""
    assert key_of([5, 6], None, [7]).hex() == "f524b95f08afc2bb6dfe2deb76848056"
    assert key_of([5, 6], [1], [7]).hex() == "2e018dc94b0dfa3f6767559a075b9bea"
