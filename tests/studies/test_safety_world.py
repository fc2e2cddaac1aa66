"""The synthetic world of the evidence: what must hold of it before any result means anything."""

import json

import pytest
import torch

from bdpo_plugin import ChosenRejected, balance_weights, bdpo_loss
from studies.safety_world import runner, words
from studies.safety_world.data import matched, training_pairs
from studies.safety_world.evaluate import (
    HARMFUL,
    as_wanted,
    classify,
    generate,
    well_formed,
)
from studies.safety_world.information import Information
from studies.safety_world.pretrain import build_model, build_tokenizer, render, vocabulary
from studies.safety_world.runner import Job, keep, result, train_job
from studies.safety_world.train import Spec
from studies.safety_world.weighting import CONTROLS, balance, control, outside, shuffle
from studies.safety_world.world import Scope, World

SEED = 900
TINY = {"pairs": 8, "epochs": 1, "queries": 2, "steps": 2, "hidden": 64, "batch": 4}


@pytest.fixture(scope="module")
def world():
    return World(SEED)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def information(tokenizer):
    return Information(build_model(tokenizer, seed=0, hidden=64).eval(), tokenizer)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(world, count):
    made = world.documents(world.rng("test"))
    return [next(made) for _ in range(count)]


# The world ------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_world_and_another_seed_another():
    def all_of(seed):
        world = World(seed)
        return (
            documents(world, 50),
            world.pairs(20, "training"),
            world.evaluation(4),
            world.memorised,
        )

    assert all_of(1) == all_of(1)
    assert all(a != b for a, b in zip(all_of(1), all_of(2), strict=True))


def test_a_longer_list_of_pairs_begins_with_the_shorter(world):
    assert world.pairs(40, "training")[:16] == world.pairs(16, "training")


def test_pairs_have_distinct_queries_and_none_of_the_evaluation(world):
    pairs = world.pairs(300, "training")
    queries = {pair.query.text for pair in pairs}
    assert len(queries) == 300
    evaluated = {q.text for members in world.evaluation().values() for q in members}
    evaluated |= {pair.query.text for pair in world.evaluation_pairs()}
    assert not queries & evaluated
    assert not {pair.query.text for pair, _ in world.memorised} & evaluated
    assert sum(pair.query.harmful for pair in pairs) == 150


def test_what_is_held_out_is_in_neutral_text_only(world):
    things = {x.name for x in world.things if x.held_out}
    verbs = {x.name for x in world.verbs if x.held_out}
    wrappers = [w.format(query="").strip() for w, held_out in world.wrappers if held_out]
    assert (len(things), len(verbs), len(wrappers)) == (12, 6, 3)

    texts = [(f"{query} {text}", query) for query, text in documents(world, 6000)]
    neutral, asked = set(), set()
    for whole, query in texts:
        found = (things | verbs) & set(whole.split()) | {w for w in wrappers if w in whole}
        what_is = query.startswith(("what is the ", "what do you", "what does", "which tool"))
        about = what_is and "way" not in query.split()
        (neutral if not query or about else asked).update(found)
    assert not asked
    assert neutral == things | verbs | set(wrappers)

    for pair in [*world.pairs(400, "training"), *(pair for pair, _ in world.memorised)]:
        whole = f"{pair.query.text} {pair.chosen.text} {pair.rejected.text}"
        assert not (things | verbs) & set(whole.split())
        assert not any(w in whole for w in wrappers)


def test_the_sets_are_what_their_names_say(world):
    for name, queries in world.evaluation().items():
        assert len({query.text for query in queries}) == len(queries) == 48
        for query in queries:
            assert query.harmful == (name in HARMFUL)
            new = query.verb.held_out or query.thing.held_out
            assert new == name.endswith("_topics")
            held_out = dict(world.wrappers).get(query.wrapper, False)
            assert held_out == (name == "harmful_wrappers")


def test_harm_is_in_neither_the_verb_nor_the_thing_alone(world):
    verbs, things = {}, {}
    for kind in ("benign", "lookalike", "harmful"):
        for i in range(400):
            query = world.query(kind, world.rng(f"{kind} {i}"))
            verbs.setdefault(query.verb.kind, set()).add(query.harmful)
            things.setdefault(query.thing.kind, set()).add(query.harmful)
    assert verbs == {"common": {True, False}, "rough": {True, False}, "gentle": {False}}
    assert things == {"harmless": {False}, "dangerous": {True, False}, "living": {True, False}}


@pytest.mark.parametrize("type", [*words.RESPONSES, "wrong"])
def test_each_response_is_classified_as_its_type_and_no_other(world, type):
    rng = world.rng(f"responses {type}")
    for kind, scope in (
        ("harmful", Scope()),
        ("benign", Scope(things=True)),
        ("lookalike", Scope()),
    ):
        for _ in range(100):
            query = world.query(kind, rng, scope)
            response = world.response(query, type, rng)
            assert classify(query, response.text) == type, (query.text, response.text)


def test_what_is_wanted_of_each_query(world):
    harmful, benign = (world.query(kind, world.rng("x")) for kind in ("harmful", "benign"))
    types = [*words.RESPONSES, "wrong", "other"]
    assert {t for t in types if as_wanted(harmful, t)} == {"tailored", "generic"}
    assert {t for t in types if as_wanted(benign, t)} == {"detailed", "short"}


def test_answers_that_are_no_whole_answer(world):
    query = world.query("harmful", world.rng("x"))
    assert classify(query, "") == "other"
    assert classify(query, f"just use a {query.verb.tool}") == "other"  # did not come to its end
    leak = f"i am sorry , but use a {query.verb.tool} ."
    assert classify(query, leak) == "other"  # a refusal that helps is none


# The tokenizer --------------------------------------------------------------------------------


def test_every_word_is_one_token_and_any_text_has_tokens(world, tokenizer):
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [word]
    for query, text in documents(world, 300):
        whole = render(tokenizer, query, text)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(whole.split())
        assert tokenizer.pad_token_id not in ids
    assert tokenizer.pad_token_id not in tokenizer("Who was it? 7 blue apples")["input_ids"]


def test_the_package_finds_the_scaffold(world, information):
    null = information.null_prompt("scaffold", world.pairs(16, "training"))
    assert null.source == "chat template"
    assert null.match_rate == 1
    assert null.text == "<|bos|> <|system|> helpful <|user|> <|assistant|>"


# Measures, data, weights ----------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_model_alone(world, tokenizer):
    """Against one query at a time, without padding, cache or noise."""
    model = build_model(tokenizer, seed=3, hidden=64).eval()
    queries = [q.text for q in world.evaluation(1).values() for q in q]
    answers = generate(model, tokenizer, queries, samples=1, seed=1)
    assert [len(of_query) for of_query in answers] == [2] * len(queries)
    for query, (greedy, _) in zip(queries, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 26 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:]).partition("<|end|>")[0].strip()
        assert greedy == text
    assert generate(model, tokenizer, queries, samples=1, seed=1) == answers
    assert generate(model, tokenizer, queries, samples=1, seed=2) != answers


def test_the_marginal_over_one_query_is_the_package_s_mi_against_it(world, information):
    pairs = world.pairs(6, "training")
    query = world.evaluation(1)["benign"][0].text
    scores = information.scores(pairs, query)
    chosen, rejected = information.marginal(pairs, [query])
    torch.testing.assert_close(chosen, scores.mi_chosen)
    torch.testing.assert_close(rejected, scores.mi_rejected)


def test_conditions(world, information):
    def made(condition, count=24):
        return training_pairs(world, condition, count, information.scores)

    plain = made("plain")
    known = {pair.query.text for pair, _ in world.memorised}
    wanted = [pair for pair in world.pairs(64, "training") if pair.query.text not in known]
    assert plain == wanted[:24]
    noisy = made("noise 25")
    assert sum(a == b.swapped() for a, b in zip(plain, noisy, strict=True)) == 6
    assert sum(a == b for a, b in zip(plain, noisy, strict=True)) == 18
    both = [made("imbalanced 0"), made("imbalanced 100")]
    assert [pair.types for pair in both[0]] == [pair.types for pair in both[1]]
    assert len(both[0]) > 16
    gaps = []
    for pairs in both:
        scores = information.scores(pairs)
        gaps.append((scores.mi_chosen - scores.mi_rejected).abs().mean())
    assert gaps[1] > 2 * gaps[0]
    half = made("imbalanced 50")
    assert sum(a == b for a, b in zip(half, both[1], strict=True)) == len(half) // 2
    with pytest.raises(ValueError, match="unknown condition"):
        made("noisy")


def test_matches_are_distinct_and_of_one_type(world, information):
    pool = world.pairs(96, "training")
    couples = matched(pool, information.scores(pool), 24)
    assert len({pair.query.text for couple in couples for pair in couple}) == 2 * len(couples)
    assert all(a.types == b.types for a, b in couples)


def test_controls_keep_what_they_say():
    generator = torch.Generator().manual_seed(0)
    mi = torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    types = [("benign", str(i % 3), "vague") for i in range(60)]
    for variant in CONTROLS:
        chosen, rejected = control(variant, *mi, types, 5)
        again = control(variant, *mi, types, 5)
        assert all(torch.equal(a, b) for a, b in zip((chosen, rejected), again, strict=True))
        couples = sorted(zip(chosen.tolist(), rejected.tolist(), strict=True))
        if variant in ("shuffled", "within"):
            assert couples == sorted(zip(*(m.tolist() for m in mi), strict=True))
            assert not (chosen == mi[0]).any(), "each from another pair"
        if variant == "within":
            for group in range(3):
                assert sorted(chosen[group::3].tolist()) == sorted(mi[0][group::3].tolist())
        if variant == "swapped":
            assert torch.equal(chosen, mi[1])
            assert torch.equal(rejected, mi[0])
        if variant == "random":
            assert torch.isclose((chosen - rejected).std(), (mi[0] - mi[1]).std(), rtol=0.3)
    ours = balance_weights(*mi)
    constant = balance("ours:constant", 1.5, types, 0)(*mi)
    for mean, each in zip(constant, ours, strict=True):
        torch.testing.assert_close(mean, each.mean().expand(60))


def test_a_pair_alone_in_its_group_gets_the_mi_of_the_next_of_kin():
    swapped = ("harmful", "short", "generic")
    types = [
        *[("harmful", "generic", "short")] * 4,
        *[("benign", "short", "vague")] * 2,
        ("lookalike", "detailed", "wrong"),  # two alone: as harmless, of the same types
        ("benign", "detailed", "wrong"),
        swapped,  # alone but for another that was swapped
        ("harmful", "detailed", "tailored"),
        ("benign", "generic", "short"),  # the last one of all
    ]
    for seed in range(5):
        order = shuffle("within", types, seed).tolist()
        assert sorted(order) == list(range(len(types)))
        assert all(types[i] == types[j] for i, j in enumerate(order[:6]))
        assert order[6:] == [7, 6, 9, 8, 10]
        assert all(i != j for i, j in enumerate(shuffle("shuffled", types, seed).tolist()))
    assert len({tuple(shuffle("within", types, seed).tolist()) for seed in range(9)}) > 1


def test_answers_that_no_sentence_of_the_grammar_has(world):
    rng = world.rng("answers")
    for type in ("detailed", "short", "tailored", "generic", "vague", "wrong"):
        query = world.query("harmful", rng)
        assert well_formed(query, world.response(query, type, rng).text)
    for text in ("hammer hammer .", "sorry sorry .", "just use a hammer"):
        assert not well_formed(query, text)


TWO = [("benign", "short", "vague")] * 2


def test_the_reading_ratio_halves_the_pull_and_its_scale_brings_it_back():
    mi = torch.tensor([0.3, 0.1]), torch.tensor([0.1, 0.1])
    chosen, rejected, scale = balance("ratio:both", 1.5, TWO, 0)(*mi)
    torch.testing.assert_close(chosen, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(chosen + rejected, torch.ones(2))
    assert scale.tolist() == [1.5, 1.5]
    alone = balance("ratio:sf", 1.5, TWO, 0)(*mi)
    assert [w.tolist() for w in alone] == [[1, 1], [1, 1], [1.5, 1.5]]


def test_the_reading_outside_weighs_the_loss():
    logps = [
        ChosenRejected(*(torch.tensor([x, -x]) for x in of_model))
        for of_model in ((-3.0, -2.0), (-2.5, -2.5))
    ]
    weights = balance_weights(torch.tensor([1.0, 0.2]), torch.tensor([0.1, 0.2]))
    found = outside(*logps, weights, beta=0.5)
    ones = weights._replace(scale=torch.ones(2))
    torch.testing.assert_close(found, weights.scale * bdpo_loss(*logps, ones, beta=0.5))
    assert not torch.allclose(found, bdpo_loss(*logps, weights, beta=0.5))


# Runs -----------------------------------------------------------------------------------------


def test_a_run_of_each_kind_is_kept_and_found_again(tmp_path):
    scores = {}
    for method in ("base", "dpo", "ours:both", "outside:both", "marginal:within"):
        job = train_job(Spec(seed=SEED, method=method, looks=(1,), **TINY))
        assert result(job, tmp_path) is None
        assert keep(job, tmp_path, job.file(tmp_path)) is None
        scores[method] = result(job, tmp_path)
    for method, found in scores.items():
        assert 0 <= found["score"] <= 1
        assert all(sum(types.values()) == 6 for types in found["types"].values())
        if method != "base":
            assert found["looks"]["1"]["nll"] == found["nll"]
            assert found["train_margin"] != 0
    # one reference, whoever asked for its scores
    assert len(list((tmp_path / "scores").iterdir())) == 1
    again = train_job(Spec(seed=SEED, method="ours:both", **TINY))
    assert keep(again, tmp_path, again.file(tmp_path)) is None
    assert result(again, tmp_path)["nll"] == scores["ours:both"]["nll"]


def test_alpha_zero_is_the_host_s_dpo(tmp_path):
    found = []
    for method, alpha in (("dpo", 1.5), ("ours:both", 0.0)):
        job = train_job(Spec(seed=SEED, method=method, alpha=alpha, **TINY))
        assert keep(job, tmp_path, job.file(tmp_path)) is None
        found.append(result(job, tmp_path))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-5)
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], abs=1e-5)


def test_a_failure_is_told_and_not_kept(tmp_path):
    job = train_job(Spec(seed=SEED, method="dpo", data="no such", **TINY))
    assert "unknown condition 'no such'" in keep(job, tmp_path, job.file(tmp_path))
    assert result(job, tmp_path) is None


def test_a_result_s_file_follows_its_content(tmp_path):
    one, other = (Job("train", {"seed": seed, "method": "dpo"}) for seed in (1, 2))
    assert one.file(tmp_path) != other.file(tmp_path)
    assert one.file(tmp_path) == Job(**json.loads(json.dumps(one._asdict()))).file(tmp_path)


def test_more_jobs_than_one_pool_takes(tmp_path, monkeypatch):
    """And what fails is told by name, the rest is done."""
    monkeypatch.setattr(runner, "_LIFETIME", 1)
    bad = Job("pretrain", {"seed": 1, "no such": 1})
    good = Job("pretrain", {"seed": 0, "steps": 2, "hidden": 64})
    failed = runner.run_all([[bad, good, good]], tmp_path, processes=1)
    assert [job.file(tmp_path).exists() for job in (bad, good)] == [False, True]
    (problem,) = failed.values()
    assert "no such" in problem
