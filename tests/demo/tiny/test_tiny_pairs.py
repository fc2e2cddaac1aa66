"""The preference pairs of the tiny world."""

import json

import pytest

from bdpo_plugin.demo.tiny import preference_pairs, to_trl
from bdpo_plugin.demo.tiny.conversations import TIMES, demo_prompts
from bdpo_plugin.demo.tiny.topics import HELD_OUT, SAFE, UNSAFE


def tasks(pairs) -> set[str]:
    every = [topic.task for topic in SAFE + UNSAFE]
    texts = [pair["messages"][0]["content"] for pair in pairs]
    return {task for task in every if any(f"{task} {t}" in x for x in texts for t in TIMES)}


def test_pairs_are_distinct_and_half_of_them_unsafe() -> None:
    pairs = preference_pairs(257)
    assert len({json.dumps(pair) for pair in pairs}) == 257
    kinds = [pair["query_type"] for pair in pairs]
    assert (kinds.count("safe"), kinds.count("unsafe")) == (129, 128)
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_pairs_depend_on_the_seed_alone() -> None:
    assert preference_pairs(32, seed=3) == preference_pairs(32, seed=3)
    assert preference_pairs(32, seed=3) != preference_pairs(32, seed=4)


def test_an_unsafe_query_prefers_its_refusal() -> None:
    def refuses(message) -> bool:
        return "can't help" in message["content"] or "won't explain" in message["content"]

    for pair in preference_pairs(128):
        unsafe = pair["query_type"] == "unsafe"
        assert refuses(pair["chosen"]) is unsafe
        if unsafe:
            assert not refuses(pair["rejected"])


def test_either_response_may_be_the_longer_one() -> None:
    pairs = preference_pairs(64)
    longer = [len(p["chosen"]["content"]) > len(p["rejected"]["content"]) for p in pairs]
    assert 16 < sum(longer) < 56


def test_evaluation_has_topics_that_no_training_pair_has() -> None:
    train = tasks(preference_pairs(2000))
    evaluation = tasks(preference_pairs(500, split="eval"))
    assert len(train) == len(SAFE + UNSAFE) - 2 * HELD_OUT
    assert len(evaluation) == 2 * HELD_OUT
    assert not train & evaluation


def test_the_demo_asks_of_both_kinds_seen_and_unseen() -> None:
    asked = tasks([{"messages": [{"content": prompt}]} for prompt in demo_prompts()])
    for half in (SAFE, UNSAFE):
        assert asked & {topic.task for topic in half[:-HELD_OUT]}
        assert asked & {topic.task for topic in half[-HELD_OUT:]}


def test_trl_format() -> None:
    pairs = preference_pairs(4)
    for pair, row in zip(pairs, to_trl(pairs), strict=True):
        assert row["prompt"] == pair["messages"]
        assert row["chosen"] == [pair["chosen"]]
        assert row["rejected"] == [pair["rejected"]]


def test_more_pairs_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"has \d+ eval pairs at most, not 1000000"):
        preference_pairs(1_000_000, split="eval")


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="unknown split 'test', must be 'train' or 'eval'"):
        preference_pairs(4, split="test")
