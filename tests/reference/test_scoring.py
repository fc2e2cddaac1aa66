"""Scores of single responses: against the float64 truth, and whatever batch they are in."""

import itertools
import math
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    ARCHITECTURES,
    CPU,
    OddLogits,
    Score,
    counted_rows,
    random_side,
    recast,
    scores_of,
    sequences,
    small_model,
    truth_model,
)
from torch import nn
from transformers import PretrainedConfig, Qwen2Config

from bdpo_plugin.model.head import sum_by_row
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference import scoring
from bdpo_plugin.reference.batches import budgeted_batches, token_budget
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests
from bdpo_plugin.settings import BDPOError

NULL = np.array([7, 8, 9])


def random_jobs(n, *, gain=False, seed=0, **lengths):
    rng = np.random.default_rng(seed)
    sides = [random_side(rng, 1000, **lengths) for _ in range(n)]
    return [ScoreRequest(*side, NULL if gain else None) for side in sides]


def table(scores):
    return torch.tensor([[s.logps, 0.0 if s.gain is None else s.gain] for s in scores])


def assert_same(mine, theirs):
    torch.testing.assert_close(table(mine), table(theirs), rtol=1e-5, atol=1e-4)


# --- against the truth ---------------------------------------------------------------------


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_truth(tokenizer, architecture, gain):
    model = small_model(tokenizer, architecture)
    known = truth_model(model)
    jobs = random_jobs(9, gain=gain)
    reader = ResponseReader(chunk_elements=5 * len(tokenizer))
    for job, score in zip(jobs, scores_of(model, jobs, budget=40, reader=reader), strict=True):
        prompt, response = job.prompt_ids.tolist(), job.completion_ids.tolist()
        wanted = truth.response_logps(known, prompt, response)
        assert score.logps == pytest.approx(wanted, rel=1e-5, abs=1e-4)
        if gain:
            wanted = truth.expected_mi(known, prompt, NULL.tolist(), response, normalize=False)
            assert score.gain == pytest.approx(wanted, rel=1e-5, abs=1e-4)
            assert wanted > 1e-3 * len(response), "a model that does not read its prompt"
        else:
            assert score.gain is None


class PeakedLogits(OddLogits):
    """One token is as likely as all others together."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        others = outputs.logits[..., 1:]
        outputs.logits = torch.cat([others.logsumexp(-1, keepdim=True), others], dim=-1)
        return outputs


@pytest.mark.parametrize("gain", [False, True])
def test_a_large_vocabulary_costs_no_digits(tokenizer, gain):
    """The CPU's softmax and log_softmax lose its small terms: 1e-5 nats of each token, all of one
    sign, so that they add up."""
    model = recast(small_model(tokenizer, vocab_size=150_000, scale=18.0), PeakedLogits)
    known = truth_model(model)
    rng = np.random.default_rng(0)
    job = ScoreRequest(*(rng.integers(5, 150_000, n) for n in (4, 40)), NULL if gain else None)
    (score,) = scores_of(model, [job], budget=100)
    prompt, response = job.prompt_ids.tolist(), job.completion_ids.tolist()
    assert score.logps == pytest.approx(truth.response_logps(known, prompt, response), abs=1e-4)
    if gain:
        wanted = truth.expected_mi(known, prompt, NULL.tolist(), response, normalize=False)
        assert score.gain == pytest.approx(wanted, abs=1e-4)


def test_expected_gain_where_the_model_projects_itself(tokenizer):
    model = recast(small_model(tokenizer), OddLogits)
    known = truth_model(model)
    jobs = random_jobs(5, gain=True)
    with pytest.warns(UserWarning, match="OddLogits"):
        scores = scores_of(model, jobs)
    for job, score in zip(jobs, scores, strict=True):
        ids = job.prompt_ids.tolist(), NULL.tolist(), job.completion_ids.tolist()
        wanted = truth.expected_mi(known, *ids, normalize=False)
        assert score.gain == pytest.approx(wanted, rel=1e-5, abs=1e-4)


# --- method section 8, property 6 ----------------------------------------------------------


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("architecture", ["tied", "soft-capped", "moe"])
def test_scores_do_not_depend_on_the_batch(tokenizer, architecture, gain):
    """On padding, batch size, order, composition, or the chunk of logits."""
    model = small_model(tokenizer, architecture)
    jobs = random_jobs(12, gain=gain, prompt=(1, 30), response=(1, 30))
    reader = ResponseReader()
    alone = [scores_of(model, [job], reader=reader)[0] for job in jobs]
    for budget in (100, 10_000):
        assert_same(scores_of(model, jobs, budget=budget), alone)
    order = random.Random(0).sample(range(12), 12)
    shuffled = scores_of(model, [jobs[i] for i in order], budget=200)
    assert_same(shuffled, [alone[i] for i in order])
    assert_same(scores_of(model, jobs[3:6], budget=10_000), alone[3:6])
    # short and long together, which the budgeted batches avoid
    assert_same(scores_of(model, jobs, batches=[[0, 5, 11], [1, 2], list(range(3, 11))]), alone)
    for rows in (2, 13):
        reader = ResponseReader(chunk_elements=rows * len(tokenizer))
        assert_same(scores_of(model, jobs, budget=10_000, reader=reader), alone)


def test_a_repeated_job_has_one_score(tokenizer):
    (job,) = random_jobs(1)
    scores = scores_of(small_model(tokenizer), [job] * 5, budget=10_000)
    assert_same(scores, [scores[0]] * 5)


# --- method section 8, property 7 ----------------------------------------------------------


class TopicModel(nn.Module):
    """Its responses are drawn, token by token, from the distribution of the prompt's topic.

    The topic is the largest id below K that came so far, and 0 is no topic, so that
    log pi(y | x) is the sum of `table[topic of x, y_t]`.
    """

    def __init__(self, table):
        super().__init__()
        self.topics = len(table)
        self.config = PretrainedConfig(vocab_size=table.shape[1])
        self.lm_head = nn.Linear(self.topics, table.shape[1], bias=False)
        self.lm_head.weight.data = table.t().contiguous()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        topic = input_ids.where(input_ids < self.topics, 0).cummax(dim=1).values
        states = nn.functional.one_hot(topic, self.topics).float()
        return SimpleNamespace(logits=self.lm_head(states))


@pytest.fixture
def topic_model():
    torch.manual_seed(0)
    return TopicModel(torch.log_softmax(3 * torch.randn(4, 50), dim=-1))


def test_mutual_information_known_in_closed_form(topic_model):
    distributions = topic_model.lm_head.weight.t().double()
    null, responses = np.array([40, 41]), [np.array([10, 11, 12]), np.array([13])]
    for topic in range(4):
        for response in responses:
            prompt = np.array([40, topic, 41]) if topic else np.array([40, 42, 41])
            joint = scores_of(topic_model, [ScoreRequest(prompt, response, null)])[0]
            cond, bare = scores_of(
                topic_model, [ScoreRequest(prompt, response), ScoreRequest(null, response)]
            )
            gained = distributions[topic][response] - distributions[0][response]
            divergence = distributions[topic].exp() * (distributions[topic] - distributions[0])
            assert cond.logps - bare.logps == pytest.approx(gained.sum().item(), abs=1e-4)
            assert joint.logps == pytest.approx(cond.logps, abs=1e-5)
            wanted = len(response) * divergence.sum().item()
            assert joint.gain == pytest.approx(wanted, abs=1e-4)
            assert (abs(wanted) > 0.5) == (topic != 0)


def test_a_response_that_does_not_depend_on_its_query(tokenizer):
    """The model sees the last two tokens only, and those of the scaffold are the prompt's."""

    class Blind(TopicModel):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            state = input_ids % self.topics
            before = state.roll(1, dims=1)
            before[:, 0] = 0
            states = nn.functional.one_hot((state + 2 * before) % self.topics, self.topics)
            return SimpleNamespace(logits=self.lm_head(states.float()))

    model = Blind(torch.randn(5, 60))
    rng = np.random.default_rng(1)
    null = np.array([3, 30, 31])
    jobs = []
    for _ in range(10):
        query = rng.integers(5, 60, rng.integers(1, 9))
        jobs.append(ScoreRequest(np.array([3, *query, 30, 31]), rng.integers(5, 60, 6), null))
    joint = scores_of(model, jobs)
    bare = scores_of(model, [ScoreRequest(null, job.completion_ids) for job in jobs])
    for score, alone in zip(joint, bare, strict=True):
        assert score.logps == pytest.approx(alone.logps, abs=1e-5)
        assert score.gain == pytest.approx(0, abs=1e-6)


def test_the_null_prompt_itself_has_no_information(tokenizer):
    model = small_model(tokenizer)
    jobs = [job._replace(prompt_ids=NULL) for job in random_jobs(4, gain=True)]
    for score in scores_of(model, jobs):
        assert score.gain == pytest.approx(0, abs=1e-6)


# --- batches -------------------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30)


def tokens_of(jobs, batch, *, shared):
    """Of a batch; in a row every prompt but that of its own unit counts, as those may be others."""
    if not shared:
        return sum(jobs[i].rows for i in batch) * max(jobs[i].length for i in batch)
    of_prompt = {}
    for i in batch:
        of_prompt.setdefault(jobs[i].prompt_ids.tobytes(), []).append(jobs[i])
    total = sum(jobs[i].rows * len(jobs[i].completion_ids) for i in batch)
    for alike in of_prompt.values():
        units = -(-len(alike) // 2)
        null = 0 if alike[0].null_prompt_ids is None else len(alike[0].null_prompt_ids)
        total += units * (len(alike[0].prompt_ids) + null)
    return total


@given(lengths=lengths, gain=st.booleans(), budget=st.integers(1, 400), shared=st.booleans())
def test_batches(lengths, gain, budget, shared):
    null = np.ones(5, dtype=np.int64) if gain else None
    jobs = [
        ScoreRequest(np.ones(p, dtype=np.int64), np.ones(r, dtype=np.int64), null)
        for p, r in lengths
    ]
    batches = budgeted_batches(jobs, budget, shared=shared)
    assert sorted(i for batch in batches for i in batch) == list(range(len(jobs)))
    widths = [max(jobs[i].length for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch in batches:
        assert tokens_of(jobs, batch, shared=shared) <= budget or len(batch) <= 2
    for batch, following in itertools.pairwise(batches):
        more = batch + following[:2]
        assert tokens_of(jobs, more, shared=shared) > budget, f"{following[0]} had room"


@pytest.mark.parametrize("shared", [False, True])
def test_the_sides_of_a_pair_stay_together(shared):
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(20):
        prompt = rng.integers(5, 99, 10)
        for tokens in rng.integers(5, 60, 2):
            jobs += [ScoreRequest(prompt, np.arange(tokens)), ScoreRequest(NULL, np.arange(tokens))]
    for budget in (50, 300):  # none of them fits, or some
        batches = budgeted_batches(jobs, budget, shared=shared)
        assert sorted(i for batch in batches for i in batch) == list(range(len(jobs)))
        where = {i: number for number, batch in enumerate(batches) for i in batch}
        for pair in range(0, len(jobs), 4):  # after the prompt, then after the null prompt
            for one, other in ((pair, pair + 2), (pair + 1, pair + 3)):
                assert where[one] == where[other]
        for batch in batches:
            assert len(batch) == 2 or tokens_of(jobs, batch, shared=shared) <= budget


def test_length_and_rows_of_a_job():
    ids = np.arange
    assert (ScoreRequest(ids(3), ids(4)).length, ScoreRequest(ids(3), ids(4)).rows) == (7, 1)
    assert (
        ScoreRequest(ids(3), ids(4), ids(9)).length,
        ScoreRequest(ids(3), ids(4), ids(9)).rows,
    ) == (13, 2)
    assert ScoreRequest(ids(9), ids(4), ids(3)).length == 13


def test_sum_by_row():
    positions = torch.tensor([[False, True, True], [False] * 3, [True, False, True]])
    sums = sum_by_row(torch.tensor([1.0, 2.0, 4.0, 8.0]).half(), positions)
    assert sums.tolist() == [3, 0, 12]
    assert sums.dtype == torch.float32


def test_on_cuda_the_copy_stands_behind_its_own_batch(monkeypatch):
    """With a stand-in for the sums and for the stream."""
    order = []

    class Sums:
        is_cuda, device = True, torch.device("cuda", 1)

        def to(self, device, non_blocking):
            order.append(("copied", device, non_blocking))
            return torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    class Stream:
        def record_event(self):
            order.append("event")
            return self

        def synchronize(self):
            order.append("waited for")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    sums = scoring._Sums(Sums())
    assert order == [("copied", "cpu", True), "event"]
    assert sums.scores().tolist() == [[1, 2], [3, 4]]
    assert order[2:] == ["waited for"]


# --- read one batch late -------------------------------------------------------------------


@pytest.fixture(params=[0, 1], ids=["at once", "late"])
def behind(request, monkeypatch):
    """As on the CPU, and as on a GPU, where the next batch is queued before one is read."""
    monkeypatch.setitem(scoring.BEHIND, "cpu", request.param)
    return request.param


def test_a_batch_is_read_once_the_next_is_queued(tokenizer, behind):
    model = small_model(tokenizer)
    jobs, batches = random_jobs(6), [[0, 1], [2], [3, 4, 5]]
    wanted = scores_of(model, jobs)
    reader = ResponseReader()
    with torch.no_grad(), counted_rows(model) as rows:
        list(score_requests(model, reader, jobs[:1], [[0]], CPU))  # its trials
        rows.clear()
        seen = []
        for batch, scores in score_requests(model, reader, jobs, batches, CPU):
            seen.append((batch, len(rows)))
            assert_same([Score(*score) for score in scores.tolist()], [wanted[i] for i in batch])
    forwards = [1, 2, 3] if not behind else [2, 3, 3]
    assert seen == list(zip(batches, forwards, strict=True))


def test_ranks_in_step_read_at_once(tokenizer, behind):
    """One that cannot go on tells the others after the batch before."""
    model, reader = small_model(tokenizer), ResponseReader()
    batches = [[0, 1], [2, 3]]
    with torch.no_grad(), counted_rows(model) as rows:
        found = score_requests(model, reader, random_jobs(4), batches, CPU, lockstep=True)
        next(found)
        once = len(rows)
        next(found)
    assert len(rows) == once + 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_was_computed_before_an_error_is_not_lost(tokenizer, behind, error):
    model, reader = small_model(tokenizer), ResponseReader()
    jobs = random_jobs(6)
    scores_of(model, jobs[:1], reader=reader)
    turns = itertools.count()

    def fail(*_):
        if next(turns) == 2:
            raise error("at the third batch")

    model.register_forward_pre_hook(fail)
    done = []

    def run():
        for batch, _ in score_requests(model, reader, jobs, [[0, 1], [2, 3], [4]], CPU):
            done.append(batch)

    with torch.no_grad(), pytest.raises(BDPOError if error is torch.OutOfMemoryError else error):
        run()
    assert done == [[0, 1], [2, 3]]


def test_a_score_that_is_not_finite_spoils_no_other(tokenizer, behind):
    """Its batch is run once more, padded, to be sure whose it is."""
    model = small_model(tokenizer, "untied")
    jobs = random_jobs(6)
    bad = ScoreRequest(jobs[2].prompt_ids, np.append(jobs[2].completion_ids, 1000))
    reader = ResponseReader()
    wanted = scores_of(model, jobs, reader=reader)
    with torch.no_grad():
        model.get_input_embeddings().weight[1000] = math.nan
    jobs[2] = bad
    with counted_rows(model) as rows:
        found = scores_of(model, jobs, batches=[[0, 1, 2], [3, 4, 5]], reader=reader)
    assert rows == [3, 3, 3]
    assert [math.isfinite(score.logps) for score in found] == [i != 2 for i in range(6)]
    assert_same(found[:2] + found[3:], wanted[:2] + wanted[3:])


# --- out of memory -------------------------------------------------------------------------


def limited(model, rows):
    """The model on a device with memory for so many sequences; what it tried, and a reader of it
    that has met it before."""
    reader, tried = ResponseReader(), []
    scores_of(model, random_jobs(1), reader=reader)

    def check(_, __, kwargs):
        packed = kwargs.get("position_ids")
        tried.append(len(kwargs["input_ids"]) if packed is None else sequences(packed))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return tried, reader


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_a_batch_that_does_not_fit_is_halved(tokenizer, rows, behind):
    jobs = random_jobs(17)
    wanted = scores_of(small_model(tokenizer), jobs)
    model = small_model(tokenizer)
    tried, reader = limited(model, rows)
    assert_same(scores_of(model, jobs, budget=10_000, reader=reader), wanted)
    failed = [n for n in tried if n > rows]
    assert 1 <= len(failed) <= 5, "the batches that follow are halved with it"


def test_a_single_sequence_that_does_not_fit(tokenizer):
    model = small_model(tokenizer)
    _, reader = limited(model, 0)
    jobs = random_jobs(3)
    longest = max(job.length for job in jobs)
    with pytest.raises(BDPOError, match=rf"{longest} tokens alone does not fit") as raised:
        scores_of(model, jobs, budget=10_000, reader=reader)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_each_pair_of_rows_of_an_expected_score_counts_as_one(tokenizer):
    model = small_model(tokenizer)
    _, reader = limited(model, 1)
    with pytest.raises(BDPOError, match="alone does not fit"):
        scores_of(model, random_jobs(4, gain=True), reader=reader)


def test_batches_done_before_are_not_done_again(tokenizer, behind):
    model, jobs = small_model(tokenizer), random_jobs(12)
    _, reader = limited(model, 3)
    batches = [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11]]
    with torch.no_grad(), counted_rows(model):
        done = [b for b, _ in score_requests(model, reader, jobs, batches, CPU)]
    assert done[0] == [0, 1, 2]
    assert sorted(i for batch in done for i in batch) == list(range(12))


def test_what_did_not_fit_is_let_go_before_it_is_tried_in_halves(tokenizer, monkeypatch):
    """The error of a pass keeps what the pass had made, as long as it is being handled."""
    model, jobs = small_model(tokenizer), random_jobs(4)
    reader, alive = ResponseReader(), []
    scores_of(model, jobs[:1], reader=reader)
    made: list[weakref.ref] = []

    def check(_, __, kwargs):
        activations = torch.zeros(1000)
        made.append(weakref.ref(activations))
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def empty_cache():
        alive.append([one() is not None for one in made])

    model.register_forward_pre_hook(check, with_kwargs=True)
    monkeypatch.setattr(torch.cpu, "empty_cache", empty_cache, raising=False)
    scores_of(model, jobs, budget=10_000, reader=reader)
    assert alive == [[False]]


# --- the release of the scoring ---------------------------------------------------------------

#: By release of the scoring: log-probability and gain of the first three responses, in nats. Where
#: this fails and the numbers are right as they are now, raise `VERSION` and add a line.
GOLDEN = {
    1: {
        "tied": [(-29.63784, 0.38339), (-53.89175, 0.00697), (-75.10126, 0.53816)],
        "soft-capped": [(-29.16860, 0.34783), (-52.79549, 0.01194), (-74.41617, 0.42614)],
        "moe": [(-31.02471, 1.13058), (-57.05040, 0.11539), (-77.61262, 1.30930)],
    }
}


def fixed_model(tokenizer, architecture):
    """Of weights that no random generator makes, and no release of one changes."""
    # of attention, scaled_dot_product_attention caps nothing, and newer releases do not take it
    options = {"attn_logit_softcapping": None} if architecture == "soft-capped" else {}
    model = small_model(tokenizer, architecture, **options)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            waves = torch.sin(places * 0.7 + number) * (0.3 if parameter.dim() > 1 else 0.1)
            parameter.copy_((waves + (parameter.dim() == 1)).view_as(parameter))
    return model


@pytest.mark.parametrize("architecture", GOLDEN[1])
def test_other_scores_are_another_release(tokenizer, architecture):
    null = np.array([7, 8, 9])
    jobs = [ScoreRequest(np.arange(5, 9 + i), np.arange(40, 44 + 3 * i), null) for i in range(3)]
    found = [list(score) for score in scores_of(fixed_model(tokenizer, architecture), jobs)]
    assert scoring.VERSION in GOLDEN, "add its numbers here"
    wanted = GOLDEN[scoring.VERSION][architecture]
    assert np.array(found) == pytest.approx(np.array(wanted), rel=1e-5, abs=1e-4), found


# --- the reference in force ----------------------------------------------------------------


def state_of(model):
    return (
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        getattr(model, "active_adapter", None),
        torch.is_grad_enabled(),
    )


def peft_model(tokenizer, *, reference=False, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    )
    model = peft.get_peft_model(small_model(tokenizer), config)
    if reference:
        model.add_adapter("ref", config)
    return model.train()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("kind", ["plain", "lora", "modules_to_save", "ref"])
def test_everything_is_as_before(tokenizer, kind, error):
    if kind == "plain":
        model, reference = (m := small_model(tokenizer).train()), Reference(m, "itself")
    else:
        options = {"modules_to_save": ["norm"]} if kind == "modules_to_save" else {}
        model = peft_model(tokenizer, reference=kind == "ref", **options)
        adapter = "ref" if kind == "ref" else None
        reference = Reference(model, "base", peft=model, adapter=adapter)
    # some modules are kept in evaluation mode while the rest trains
    next(m for n, m in model.named_modules() if n.endswith("layers.0")).eval()
    before, logits = state_of(model), logits_of(model)
    try:
        with reference.activated() as activated:
            assert activated is model
            assert not torch.is_grad_enabled()
            assert not any(m.training for m in model.modules())
            if error:
                raise KeyError("in the middle of the pass")
    except KeyError:
        assert error
    assert state_of(model) == before
    torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=0)


def test_adapters_are_off(tokenizer):
    model = peft_model(tokenizer, modules_to_save=["norm"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(2)
    base = logits_of(small_model(tokenizer))
    assert not torch.allclose(logits_of(model), base)
    with Reference(model, "base", peft=model).activated() as reference:
        torch.testing.assert_close(logits_of(reference), base)
        jobs = random_jobs(4)
        assert_same(scores_of(reference, jobs), scores_of(small_model(tokenizer), jobs))


def test_the_adapter_of_the_reference_is_on(tokenizer):
    model = peft_model(tokenizer, reference=True)
    trained = logits_of(model)
    model.set_adapter("ref")
    wanted = logits_of(model)
    model.set_adapter("default")
    assert not torch.allclose(trained, wanted)
    with Reference(model, "ref", peft=model, adapter="ref").activated() as reference:
        torch.testing.assert_close(logits_of(reference), wanted)
    torch.testing.assert_close(logits_of(model), trained)


def test_an_adapter_that_is_not_there(tokenizer):
    model = peft_model(tokenizer)
    before = state_of(model)
    with (
        pytest.raises(ValueError, match="ref"),
        Reference(model, "ref", peft=model, adapter="ref").activated(),
    ):
        pass
    assert state_of(model) == before


def test_autocast_of_the_policy_is_used(tokenizer):
    model = small_model(tokenizer)
    exact = logits_of(model)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with Reference(model, "itself", autocast=autocast).activated():
        rounded = logits_of(model)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.2)
    assert not torch.is_autocast_enabled("cpu")


def test_dropout_is_off(tokenizer):
    model = small_model(tokenizer, attention_dropout=0.5).train()
    jobs = random_jobs(3)
    with Reference(model, "itself").activated() as reference:
        assert_same(scores_of(reference, jobs), scores_of(reference, jobs))


def test_scores_are_finite_numbers(tokenizer):
    for score in scores_of(small_model(tokenizer), random_jobs(5, gain=True)):
        assert math.isfinite(score.logps)
        assert score.logps < 0 <= score.gain + 1e-6


@pytest.mark.parametrize(
    ("kind", "free_gib", "tokens"),
    [
        ("cpu", 0, 1024),
        ("cuda", 1, 4096),
        ("cuda", 10, 11014),
        ("cuda", 70, 16384),
        ("mps", 0, 4096),
    ],
)
def test_a_batch_is_as_large_as_the_free_memory_of_a_gpu_allows(
    monkeypatch, kind, free_gib, tokens
):
    """Half a GiB of it is of torch's own, kept and not used. A quarter of 10 GiB has room for
    2.68e9 / (3,584 x 17 x 4) = 11,014 tokens of a 7B model."""
    half = 2**29
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * half)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * half)
    free = free_gib * 2**30 - half
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    model = nn.Module()
    model.config = Qwen2Config(hidden_size=3584)
    assert token_budget(model, torch.device(kind)) == tokens
