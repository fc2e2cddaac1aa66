"""Two processes give the scores of one, row by row, share the work, and train as ever."""

import subprocess
import sys
from pathlib import Path

import pytest
import scoring_worker
import torch
import wrapped_training
from small_models import small_model, stored

from bdpo_plugin.reference.store import ASIDE, ScoreStore
from bdpo_plugin.reference.verification import SCORES
from bdpo_plugin.settings import BDPOSettings

pytestmark = pytest.mark.slow

WORKER = Path(scoring_worker.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(WORKER, directory),
    ]
    environment = scoring_worker.environment()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    seen = [torch.load(directory / f"rank{i}.pt", weights_only=False) for i in range(2)]
    assert [s["world"] for s in seen] == [2, 2]
    return directory, seen


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(tokenizer)


def assert_equal(mine, theirs):
    for name, ours, other in zip(mine._fields, mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-4, msg=name)


def test_the_scores_of_one_process(ranks, model):
    alone, _ = scoring_worker.score(model, scoring_worker.PAIRS)
    for seen in ranks[1]:
        assert_equal(seen["first"][0], alone)


def test_the_ranks_share_the_work(ranks, model):
    _, alone = scoring_worker.score(model, scoring_worker.PAIRS)
    rows = [sum(seen["first"][1]) for seen in ranks[1]]
    assert sum(rows) == sum(alone), "no score is computed twice"
    assert max(rows) < 0.6 * sum(alone)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fewer", "9, 8 pairs in ranks 0 to 1; the first that differs is row 8."),
        ("other order", "4, 4 pairs in ranks 0 to 1; the first that differs is row 1."),
    ],
)
def test_ranks_with_other_data_are_refused(ranks, case, words):
    """In each, before anything is computed."""
    directory, seen = ranks
    for rank in seen:
        message, passes = rank[case]
        assert "The ranks of this run have different train data" in message
        assert words in message
        assert passes == []
    assert not (directory / "different").exists()


@pytest.mark.parametrize("passes", [0, 4])
def test_where_one_rank_cannot_go_on_all_stop(ranks, passes):
    """At once where it cannot even begin; what was computed is kept, in both."""
    directory, seen = ranks
    (first, good), (second, bad) = (rank[f"fails after {passes}"] for rank in seen)
    assert "alone does not fit in the memory of the device" in second
    assert first == f"Rank 1 of this run could not go on. {second}"
    assert (len(good) == 1) == (passes == 0)
    kept = stored(ScoreStore(directory / f"fails{passes}", ["model", "tokenizer"]))
    assert len(kept) == sum(good) + sum(bad[:passes])


def test_the_store_holds_every_score_of_both(ranks, model, tmp_path):
    directory, _ = ranks
    scoring_worker.score(model, scoring_worker.PAIRS, tmp_path)
    wanted = stored(ScoreStore(tmp_path, ["model", "tokenizer"]))
    found = stored(ScoreStore(directory / "store", ["model", "tokenizer"]))
    assert wanted.keys() <= found.keys()
    for key, (logps, _) in wanted.items():
        assert found[key][0] == pytest.approx(logps, rel=1e-5, abs=1e-4)


def test_a_second_run_computes_nothing_in_any_rank(ranks):
    for seen in ranks[1]:
        scores, passes = seen["again"]
        assert 1 <= len(passes) <= SCORES, "some are computed again, to see that they are right"
        assert not scores.computed.any()
        for ours, other in zip(scores[:-1], seen["first"][0][:-1], strict=True):
            assert torch.equal(ours, other)


def test_another_model_s_scores_are_set_aside_in_all_ranks(ranks, model):
    directory, seen = ranks
    alone, _ = scoring_worker.score(model, scoring_worker.PAIRS)
    for rank in seen:
        scores, _ = rank["mistaken"]
        assert scores.computed.all()
        assert_equal(scores, alone)
        (first, _), (again, passes) = rank["mistaken, sharded"]
        assert first.computed.all()
        assert not again.computed.any()
        assert len(passes) == len(seen[0]["mistaken, sharded"][1][1]) > 0
        alone_too = [column[:6] for column in alone[:-1]]
        for mine, theirs in zip(again[:-1], alone_too, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    for name in ("mistaken", "sharded"):
        folders = sorted(path.name for path in (directory / name).iterdir())
        assert [ASIDE in folder for folder in folders] == [False, True]


def test_without_a_store_each_rank_scores_its_own(ranks, model):
    for rank, seen in enumerate(ranks[1]):
        alone, _ = scoring_worker.score(model, scoring_worker.PAIRS[: 5 + 3 * rank])
        assert_equal(seen["own"][0], alone)


@pytest.mark.parametrize("wrapper", ["FSDP1", "FSDP2"])
def test_ranks_that_share_a_model_run_as_many_batches(ranks, model, wrapper):
    """Each with pairs of its own, as in a training step: one that runs fewer would hang."""
    passes = []
    for rank, seen in enumerate(ranks[1]):
        scores, rows = seen[f"own, {wrapper}"]
        alone, _ = scoring_worker.score(model, scoring_worker.PAIRS[: 5 + 3 * rank])
        assert_equal(scores, alone)
        passes.append(len(rows))
    assert passes[0] == passes[1]
    assert len(ranks[1][0]["own"][1]) < len(ranks[1][1]["own"][1]), "apart they run fewer"


def test_the_expected_estimator(ranks, model):
    settings = BDPOSettings(mi_estimator="expected")
    alone, _ = scoring_worker.score(model, scoring_worker.PAIRS[:7], settings=settings)
    for seen in ranks[1]:
        assert_equal(seen["expected"][0], alone)


@pytest.mark.parametrize("case", wrapped_training.CASES, ids=str)
def test_training_through_wrappers_of_the_model(ranks, case):
    """The response positions alone, read inside the forward of DDP and FSDP."""
    for seen in ranks[1]:
        mine, wanted = seen["losses"][case]
        assert mine == pytest.approx(wanted, rel=1e-5)
        assert wanted[2] < wanted[0]
