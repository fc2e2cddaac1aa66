"""A whole dataset: every score once, what is stored not again, and nothing without a score."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scoring_worker
import torch
import truth
from small_models import (
    ARCHITECTURES,
    CPU,
    counted_rows,
    random_pairs,
    random_side,
    small_model,
    stored,
    truth_model,
)

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference import score_pairs as dataset
from bdpo_plugin.reference import shared_store as exchange
from bdpo_plugin.reference import verification
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.score_pairs import score_dataset, score_pairs
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.settings import BDPOError, BDPOSettings

NULL = NullPrompt((7, 8, 9), "", "")
EXPECTED = BDPOSettings(mi_estimator="expected")


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores", ["model", "tokenizer"])


@pytest.fixture
def score(model, store):
    """Scores pairs with the store; `score.rows` are the rows that the last call computed."""
    reader = ResponseReader()

    def run(pairs, settings=None, *, null=NULL, store=store, **kwargs):
        reference = Reference(model, "itself")
        with counted_rows(model) as rows:
            try:
                given = (pairs, reference, null, settings or BDPOSettings(score_tokens=64))
                common = {"reader": reader, "device": CPU}
                if store is None:
                    return score_pairs(*given, **common)
                return score_dataset(*given, **common, store=store, **kwargs)
            finally:
                run.rows, run.passes = sum(rows), len(rows)

    run(random_pairs(1, seed=99), store=None)  # the reader has met the model
    return run


def same(mine, theirs, rows=slice(None)):
    for name, ours, other in zip(mine._fields[:-1], mine[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(ours, other[rows], rtol=1e-5, atol=1e-4, msg=name)
    return True


# --- what the scores are -------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("estimator", ["pointwise", "expected"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_scores_are_those_of_the_truth(tokenizer, architecture, estimator, normalize):
    model = small_model(tokenizer, architecture)
    known = truth_model(model)
    pairs = random_pairs(4)
    scores = score_pairs(
        pairs,
        Reference(model, "itself"),
        NULL,
        BDPOSettings(mi_estimator=estimator, mi_normalize=normalize),
        reader=ResponseReader(),
        device=CPU,
    )
    for i, pair in enumerate(pairs):
        wanted = truth.score_pair(
            known,
            pair.chosen.prompt_ids.tolist(),
            list(NULL.ids),
            pair.chosen.completion_ids.tolist(),
            pair.rejected.completion_ids.tolist(),
            estimator=estimator,
            normalize=normalize,
        )
        for name, value in wanted._asdict().items():
            got = getattr(scores, name)[i].item()
            assert got == pytest.approx(value, rel=1e-5, abs=1e-4), (name, i)


@pytest.mark.parametrize("settings", [None, EXPECTED])
def test_dtypes_and_shapes(score, settings):
    scores = score(random_pairs(5), settings)
    assert {t.shape for t in scores} == {(5,)}
    floats, lengths, computed = scores[:4], scores[4:6], scores[6]
    assert {t.dtype for t in floats} == {torch.float32}
    assert {t.dtype for t in lengths} == {torch.int64}
    assert computed.dtype == torch.bool
    assert not any(t.requires_grad for t in scores)


@pytest.mark.parametrize("settings", [None, EXPECTED])
def test_a_store_changes_no_score(score, settings):
    pairs = random_pairs(6)
    fresh = score(pairs, settings, store=None)
    assert same(score(pairs, settings), fresh)
    read = score(pairs, settings)
    assert score.passes == 0
    assert same(read, fresh)


@pytest.mark.parametrize("settings", [None, EXPECTED])
def test_sides_with_different_prompts(score, settings):
    """Truncation may cut the prompts of the two sides at different places."""
    rng = np.random.default_rng(0)
    pairs = [Pair(random_side(rng, 1000), random_side(rng, 1000)) for _ in range(4)]
    scores = score(pairs, settings)
    swapped = score([Pair(p.rejected, p.chosen) for p in pairs], settings)
    assert score.passes == 0
    assert torch.equal(scores.mi_chosen, swapped.mi_rejected)
    assert torch.equal(scores.ref_rejected_logps, swapped.ref_chosen_logps)


# --- what is computed ----------------------------------------------------------------------


def test_nothing_is_computed_twice(score):
    pairs = random_pairs(6)
    assert score(pairs).computed.all()
    assert score.rows == 4 * len(pairs)
    assert not score(pairs).computed.any()
    assert score.passes == 0
    score(pairs[::-1], BDPOSettings(score_tokens=1000, alpha=3.0, mi_normalize=False))
    assert score.passes == 0


def test_duplicates_are_computed_once(score):
    pairs = random_pairs(3)
    scores = score([*pairs, pairs[0], pairs[2]])
    assert score.rows == 4 * len(pairs)
    assert same(scores, scores, [0, 1, 2, 0, 2])
    # one response to two prompts: its null term is one
    side = pairs[0].chosen
    other = Side(side.prompt_ids[::-1].copy(), side.completion_ids)
    score([Pair(other, pairs[0].rejected)])
    assert score.rows == 1


def test_changed_data_computes_only_what_changed(score):
    pairs = random_pairs(6)
    before = score(pairs)
    new = random_pairs(2, seed=77)
    changed = [*pairs[:2], new[0], Pair(pairs[3].chosen, new[1].rejected), *pairs[4:]]
    scores = score(changed)
    assert scores.computed.tolist() == [False, False, True, True, False, False]
    assert score.rows == 4 + 2
    kept = [0, 1, 4, 5]
    assert torch.equal(scores.mi_chosen[kept], before.mi_chosen[kept])
    assert same(scores, score(changed, store=None))


def test_another_null_prompt_computes_the_null_terms_alone(score):
    pairs = random_pairs(4)
    score(pairs)
    score(pairs, null=NullPrompt((11,), "", ""))
    assert score.rows == 2 * len(pairs)


def test_estimators_do_not_mix(score):
    pairs = random_pairs(3)
    pointwise = score(pairs)
    expected = score(pairs, EXPECTED)
    assert expected.computed.all()
    assert not torch.allclose(pointwise.mi_chosen, expected.mi_chosen)
    assert same(score(pairs), pointwise)
    assert same(score(pairs, EXPECTED), expected)
    assert score.passes == 0
    score(pairs, EXPECTED, null=NullPrompt((11,), "", ""))
    assert score.rows == 4 * len(pairs)


def test_another_reference_computes_everything(score, store, tmp_path):
    pairs = random_pairs(3)
    score(pairs)
    score(pairs, store=ScoreStore(tmp_path / "scores", ["another model", "tokenizer"]))
    assert score.rows == 4 * len(pairs)


def test_without_a_store_nothing_is_kept(score, store):
    pairs = random_pairs(3)
    for _ in range(2):
        assert score(pairs, store=None).computed.all()
        assert score.rows == 4 * len(pairs)
    assert not store.path.exists()


def test_the_same_data_under_another_name_and_rows(score, store):
    pairs = random_pairs(5)
    score(pairs, name="train", rows=range(5))
    score(pairs[3:], name="eval", rows=[0, 1])
    assert score.passes == 0


# --- interrupted passes --------------------------------------------------------------------


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_crash_loses_nothing_that_was_done(model, score, store, at):
    pairs = random_pairs(16)
    wanted = score(pairs, store=None)
    every = score.rows
    assert score.passes > 4
    count = iter(range(100))

    def crash(*_):
        if next(count) == at:
            raise Crash

    handle = model.register_forward_pre_hook(crash)
    training = model.train().training
    with pytest.raises(Crash):
        score(pairs)
    handle.remove()
    assert model.training == training
    kept = len(stored(store))
    assert 0 < kept < every
    scores = score(pairs)
    assert score.rows == every - kept + store.verified.scores
    assert same(scores, wanted)


def test_a_killed_pass_goes_on_where_it_was(tokenizer, tmp_path):
    worker = subprocess.Popen(
        [sys.executable, scoring_worker.__file__, tmp_path, "0.3"],
        env=scoring_worker.environment(),
        stderr=subprocess.PIPE,
    )
    store = ScoreStore(tmp_path / "store", ["model", "tokenizer"])
    deadline = time.monotonic() + 120
    while not list(store.path.glob("*.parquet")):
        assert worker.poll() is None, worker.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    worker.stderr.close()
    assert not (tmp_path / "rank0.pt").exists()
    (store.path / ".half-written.tmp").write_bytes(b"PAR1")

    model = small_model(tokenizer)
    wanted, every = scoring_worker.score(model, scoring_worker.PAIRS)
    kept = len(stored(store))
    assert 0 < kept < sum(every) - 1
    scores, rows = scoring_worker.score(model, scoring_worker.PAIRS, tmp_path / "store")
    again = sum(rows) - (sum(every) - kept)
    assert 0 < again <= verification.SCORES, "some are computed again, to see that they are right"
    assert same(scores, wanted)
    assert (~scores.computed).sum() < len(scoring_worker.PAIRS)


def test_what_is_done_is_written_while_the_pass_runs(model, score, store, monkeypatch):
    monkeypatch.setattr(exchange, "_FLUSH_SECONDS", 0)
    files = []
    model.register_forward_hook(lambda *_: files.append(len(list(store.path.glob("*")))))
    score(random_pairs(6))
    assert files == list(range(score.passes))


# --- a store that fails ---------------------------------------------------


def test_a_store_that_cannot_be_written_ends_no_pass(score, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_FLUSH_SECONDS", 0)
    (tmp_path / "file").touch()
    shown = []
    store = ScoreStore(tmp_path / "file", ["a"], shown.append)
    pairs = random_pairs(8)
    assert same(score(pairs, store=store), score(pairs, store=None))
    for again in (store, ScoreStore(None, None, shown.append)):  # kept nowhere
        assert score(pairs, store=again).computed.all()
        assert score.rows == 4 * len(pairs)
    (lines,) = shown
    assert str(store.path) in lines[0]
    assert "bdpo_cache_dir" in lines[-1]


def split(store, parts):
    """Have the one file that a pass leaves be several again, as while it runs."""
    (file,) = store.path.iterdir()
    keys, scores = store._columns(file)
    for part in np.array_split(np.arange(len(keys)), parts):
        store.add(keys[part], scores[part, :1])
    file.unlink()


def test_damaged_files_are_computed_again(score, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_FLUSH_SECONDS", 0)
    shown = []
    store = ScoreStore(tmp_path / "scores", ["a"], shown.append)
    pairs = random_pairs(8)
    wanted = score(pairs, store=store)
    split(store, 5)
    files = list(store.path.iterdir())
    for file in files[:3]:
        file.write_bytes(b"")
    scores = score(pairs, store=store)
    assert 0 < score.rows < 4 * len(pairs)
    assert same(scores, wanted)
    (lines,) = shown
    assert all(file.name in lines[0] for file in files[:3])
    assert same(score(pairs, store=store), wanted)
    assert score.passes == 0


def test_no_random_state_is_moved(score):
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    score(random_pairs(8))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after


# --- pairs without a score -----------------------------------------------------------------

POISON = 17


def poison(pair, at):
    side = pair[at]._replace(prompt_ids=np.append(pair[at].prompt_ids, POISON))
    return pair._replace(**{("chosen", "rejected")[at]: side})


@pytest.fixture
def poisoned(tokenizer):
    """A model whose states are not numbers after the token POISON."""
    model = small_model(tokenizer, "untied")
    model.get_input_embeddings().weight.data[POISON] = float("nan")
    return model


@pytest.mark.parametrize("settings", [None, EXPECTED])
@pytest.mark.parametrize("rows", [None, [10, 20, 30, 40, 50, 60]])
def test_scores_that_are_not_finite_are_an_error(poisoned, tmp_path, settings, rows):
    pairs = random_pairs(6)
    pairs[2], pairs[4] = poison(pairs[2], 0), poison(pairs[4], 1)
    store = ScoreStore(tmp_path, ["a"])
    run = {"reader": ResponseReader(), "device": CPU, "store": store, "rows": rows}
    reference = Reference(poisoned, "itself")
    settings = settings or BDPOSettings()
    with pytest.raises(BDPOError, match="not finite") as raised:
        score_dataset(pairs, reference, NULL, settings, **run)
    assert "2 of 6 pairs" in str(raised.value)
    assert f"rows: {'30, 50' if rows else '2, 4'}." in str(raised.value)
    # the good ones are kept, the bad ones are tried again
    with counted_rows(poisoned) as again, pytest.raises(BDPOError):
        score_dataset(pairs, reference, NULL, settings, **run)
    assert again == [2 if settings is not EXPECTED else 4] * 2  # and to be sure whose they are


@pytest.mark.parametrize("settings", [None, EXPECTED])
def test_a_null_prompt_that_gives_no_number(poisoned, tmp_path, settings):
    """The conditional log-probabilities are finite, the mutual information is not."""
    store = ScoreStore(tmp_path, ["a"])
    with pytest.raises(BDPOError, match=r"3 of 3 pairs.*not finite"):
        score_dataset(
            random_pairs(3),
            Reference(poisoned, "itself"),
            NullPrompt((POISON,), "", ""),
            settings or BDPOSettings(),
            reader=ResponseReader(),
            device=CPU,
            store=store,
        )


def test_at_most_ten_rows_are_listed(poisoned):
    pairs = [poison(pair, 0) for pair in random_pairs(15)]
    with pytest.raises(BDPOError) as raised:
        score_pairs(
            pairs,
            Reference(poisoned, "itself"),
            NULL,
            BDPOSettings(),
            reader=ResponseReader(),
            device=CPU,
        )
    assert "15 of 15 pairs" in str(raised.value)
    assert "rows: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in str(raised.value)


def test_a_missing_score_is_an_error(score, monkeypatch):
    pairs = random_pairs(4)
    real = dataset.score_requests

    def all_but_the_last_batch(model, reader, jobs, batches, device, **options):
        yield from real(model, reader, jobs, batches[:-1], device, **options)

    monkeypatch.setattr(dataset, "score_requests", all_but_the_last_batch)
    with pytest.raises(BDPOError, match=r"of 4 pairs.*no score.*First rows: \d"):
        score(pairs, store=None)


def test_running_out_of_memory_gives_the_same_scores(model, score):
    pairs = random_pairs(8)
    wanted = score(pairs, store=None)

    def check(_, __, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    for settings in (BDPOSettings(), EXPECTED):
        scores = score(pairs, settings)
        assert scores.computed.all()
        torch.testing.assert_close(scores.ref_chosen_logps, wanted.ref_chosen_logps)
    handle.remove()
