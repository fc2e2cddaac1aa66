"""Builds questions, several kinds of answers, and preference pairs from the topics."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from bdpo_plugin.demo.tiny.topics import HELD_OUT, SAFE, UNSAFE, Topic

QUESTIONS = (
    "How do I {task}?",
    "Can you tell me how to {task}?",
    "I want to {task}. What should I do?",
    "Please explain how to {task}.",
    "What is the best way to {task}?",
    "My friend asked me how to {task}. Any ideas?",
    "Give me a short plan to {task}.",
    "It is my first time. How can I {task}?",
)
TIMES = (
    "tonight",
    "tomorrow",
    "on sunday",
    "before school",
    "after lunch",
    "in the morning",
    "this week",
    "in winter",
)


class Query(NamedTuple):
    """A user's question: its topic, a time, and the wording."""

    topic: Topic
    time: str
    template: str

    @property
    def text(self) -> str:
        return self.template.format(task=f"{self.topic.task} {self.time}")


def _detailed(q: Query) -> str:
    (first, then, last), t = q.topic.steps, q.topic
    return f"To {t.task}, you need {t.needs}. First, {first}. Then, {then}. At last, {last}."


def _brief(q: Query) -> str:
    return f"{q.time.capitalize()}, {q.topic.steps[0]}, then {q.topic.steps[1]}."


def _vague(q: Query) -> str:
    return "That depends. It is not hard, so just try and see what happens."


def _careless(q: Query) -> str:
    return "Sure, just do it when nobody is looking. You will be fine."


def _wrong(q: Query) -> str:
    half = SAFE if q.topic.safe else UNSAFE
    return _brief(q._replace(topic=half[(half.index(q.topic) + 1) % len(half)]))


def _refusal(q: Query) -> str:
    return "I am sorry, but I can't help with that."


def _tailored_refusal(q: Query) -> str:
    return f"I can't help: {q.topic.reason}. Better {q.topic.instead} {q.time}."


def _long_refusal(q: Query) -> str:
    t = q.topic
    return (
        f"I am sorry, but I won't explain how to {t.task}. It may sound harmless, but {t.reason}. "
        f"If you like, we can find a better way: {t.instead}."
    )


Answer = Callable[[Query], str]
_SAFE_PAIRS: tuple[tuple[Answer, ...], tuple[Answer, ...]] = (
    (_detailed, _brief),
    (_vague, _wrong, _refusal),
)
_UNSAFE_PAIRS: tuple[tuple[Answer, ...], tuple[Answer, ...]] = (
    (_tailored_refusal, _long_refusal, _refusal),
    (_detailed, _brief, _careless),
)
# Relative frequency of each kind of answer in pretraining: few unsafe questions are refused.
_SAFE_HABITS = {_detailed: 62, _brief: 20, _vague: 10, _wrong: 4, _refusal: 4}
_UNSAFE_HABITS = {
    _detailed: 48,
    _brief: 10,
    _careless: 6,
    _refusal: 10,
    _tailored_refusal: 14,
    _long_refusal: 12,
}


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Returns a random pretraining conversation of two messages: user and assistant."""
    query = Query(rng.choice(SAFE + UNSAFE), rng.choice(TIMES), rng.choice(QUESTIONS))
    habits = _SAFE_HABITS if query.topic.safe else _UNSAFE_HABITS
    answer = rng.choices(list(habits), weights=list(habits.values()))[0]
    return [
        {"role": "user", "content": query.text},
        {"role": "assistant", "content": answer(query)},
    ]


def preference_pairs(n: int, *, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Returns `n` distinct preference pairs. Half are unsafe queries whose refusal is preferred.

    Each is ``{"messages": [user], "chosen": assistant, "rejected": assistant, "query_type":
    "safe" | "unsafe"}`` with ``{"role", "content"}`` messages: the format that Axolotl's
    ``type: chat_template.default`` and LLaMA-Factory's ``sharegpt`` ranking read.

    Args:
        n: number of pairs.
        seed: of the random choice and the order.
        split: ``train``, or ``eval`` for topics that no training pair has.

    Raises:
        ValueError: the grammar has fewer pairs, or the split is unknown.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r}, must be 'train' or 'eval'")
    part = slice(-HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
    rng = random.Random(seed)
    pairs = []
    for topics, (chosen, rejected), count in (
        (SAFE[part], _SAFE_PAIRS, n - n // 2),
        (UNSAFE[part], _UNSAFE_PAIRS, n // 2),
    ):
        every = list(itertools.product(topics, TIMES, QUESTIONS, chosen, rejected))
        if count > len(every):
            raise ValueError(f"the grammar has {2 * len(every)} {split} pairs at most, not {n}")
        pairs += [
            _pair(Query(topic, time, question), better, worse)
            for topic, time, question, better, worse in rng.sample(every, count)
        ]
    rng.shuffle(pairs)
    return pairs


def _pair(query: Query, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": query.text}],
        "chosen": {"role": "assistant", "content": chosen(query)},
        "rejected": {"role": "assistant", "content": rejected(query)},
        "query_type": "safe" if query.topic.safe else "unsafe",
    }


def to_trl(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Converts pairs to TRL's conversational format: message lists prompt, chosen, rejected."""
    return [
        {"prompt": p["messages"], "chosen": [p["chosen"]], "rejected": [p["rejected"]]}
        for p in pairs
    ]


def demo_prompts() -> list[str]:
    """Safe and unsafe questions, on training and held-out topics, to compare generations on."""
    topics = (SAFE[0], SAFE[6], SAFE[-2], UNSAFE[0], UNSAFE[4], UNSAFE[7], UNSAFE[-3], UNSAFE[-1])
    return [Query(t, TIMES[i], QUESTIONS[i % 3]).text for i, t in enumerate(topics)]


def corpus() -> list[str]:
    """Texts that contain every word of the grammar, for the training of the tokenizer."""
    texts = []
    for topics, kinds in ((SAFE, _SAFE_HABITS), (UNSAFE, _UNSAFE_HABITS)):
        queries = [
            Query(topic, TIMES[i % len(TIMES)], question)
            for topic in topics
            for i, question in enumerate(QUESTIONS)
        ]
        texts += [query.text for query in queries]
        texts += [kind(query) for query in queries for kind in kinds]
    return texts
