"""The scores on disk: whole or not there, found again by content."""

import multiprocessing
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo_plugin.reference.store import Score, ScoreStore, default_cache_dir, score_key
from bdpo_plugin.settings import BDPOError

IDS = np.array([5, 6, 7])
KEY = score_key(IDS, None, IDS)


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path, ["model", "tokenizer"])


def some_scores(n, seed=0):
    rng = random.Random(seed)
    return {rng.randbytes(16): Score(rng.gauss(-50, 20), rng.random()) for _ in range(n)}


def test_what_is_added_is_read(store):
    assert store.read() == {}
    first, second = some_scores(20, 1), some_scores(5, 2)
    store.add(first)
    store.add(second)
    assert store.read() == first | second
    assert ScoreStore(store.path.parent, ["model", "tokenizer"]).read() == first | second


def test_a_score_without_gain(store):
    store.add({KEY: Score(-3.5, None)})
    assert store.read() == {KEY: Score(-3.5, None)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["logps", "gain"])
def test_what_is_not_finite_is_not_kept(store, bad, field):
    good = some_scores(3)
    store.add({KEY: Score(-1.0, 0.0)._replace(**{field: bad}), **good})
    assert store.read() == good


def test_nothing_to_add_makes_no_file(store):
    store.add({})
    store.add({KEY: Score(float("nan"), 0.0)})
    assert not store.path.exists()


def test_a_file_left_half_written_is_ignored(store):
    good = some_scores(4)
    store.add(good)
    (whole,) = store.path.iterdir()
    (store.path / ".0123.tmp").write_bytes(whole.read_bytes()[:100])
    assert store.read() == good


def test_a_write_that_fails_leaves_no_file_to_read(store, monkeypatch):
    good = some_scores(4)
    store.add(good)

    def fill_the_disk(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        store.add(some_scores(4, 9))
    assert store.read() == good


@pytest.mark.parametrize("damage", ["empty", "cut", "other columns", "not parquet"])
def test_a_damaged_file_is_named(store, damage):
    store.add(some_scores(50))
    (file,) = store.path.iterdir()
    if damage == "other columns":
        pq.write_table(pa.table({"text": ["a", "b"]}), file)
    else:
        size = {"empty": 0, "cut": file.stat().st_size // 2, "not parquet": 0}[damage]
        file.write_bytes(file.read_bytes()[:size] + b"hello" * (damage == "not parquet"))
    with pytest.raises(BDPOError, match=r"damaged.*Delete it") as raised:
        store.read()
    assert str(file) in str(raised.value)


def test_no_flipped_bit_goes_unnoticed(store):
    store.add(some_scores(30))
    (file,) = store.path.iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(BDPOError, match="damaged"):
            store.read()
    file.write_bytes(whole)
    assert store.read() == some_scores(30)


def test_without_the_damaged_file_the_rest_is_read(store):
    first, second = some_scores(5, 1), some_scores(5, 2)
    store.add(first)
    (file,) = store.path.iterdir()
    store.add(second)
    file.unlink()
    assert store.read() == second


def _write(directory, seed):
    store = ScoreStore(directory, ["model", "tokenizer"])
    for i in range(5):
        store.add(some_scores(10, 100 * seed + i))
        store.read()


def test_several_processes_write_at_once(store):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(store.path.parent, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    wanted = {}
    for seed in range(4):
        for i in range(5):
            wanted |= some_scores(10, 100 * seed + i)
    assert store.read() == wanted
    assert not list(store.path.glob(".*"))


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
    store.add(scores)
    assert store.read() == scores


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
    null = None if null is None else np.array(null, dtype)
    return score_key(np.array(prompt, dtype), null, np.array(response, dtype))


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
    assert score_key(ids[::2], None, ids) == score_key(ids[::2].copy(), None, ids)


def test_large_token_ids():
    assert key_of([2**31], None, [1]) != key_of([0], None, [1])
