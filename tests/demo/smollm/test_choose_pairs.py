"""The choice among pairs."""

import json

import pytest

from bdpo_plugin.demo.smollm.choose_pairs import prompts, select
from bdpo_plugin.demo.tiny import preference_pairs
from bdpo_plugin.settings import BDPOError

USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Ask?"), ("assistant", "Yes."), ("assistant", "No."))
)
PAIR = {"messages": [USER], "chosen": YES, "rejected": NO}


def test_choice(tokenizer) -> None:
    pairs = preference_pairs(60)
    counts = {"train": 10, "eval": 4}
    lengths = [
        max(
            len(
                tokenizer.apply_chat_template([*p["messages"], p[a]], return_dict=True)["input_ids"]
            )
            for a in ("chosen", "rejected")
        )
        for p in pairs
    ]
    limit = sorted(lengths)[40]
    short = [p for p, length in zip(pairs, lengths, strict=True) if length <= limit]
    one, again, other = (select(pairs, counts, tokenizer, limit, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert {split: len(found) for split, found in one.items()} == counts
    taken = one["train"] + one["eval"]
    assert all(pair in short for pair in taken)
    assert len({json.dumps(pair["messages"]) for pair in taken}) == 14
    assert taken != [pair for pair in pairs if pair in taken]


def test_no_prompt_is_in_both_splits(tokenizer) -> None:
    doubled = [PAIR, {**PAIR, "rejected": {**NO, "content": "Never."}}]
    with pytest.raises(BDPOError, match=r"only 1 pairs .* the 1 \+ 1 wanted: set --train-pairs"):
        select(doubled, {"train": 1, "eval": 1}, tokenizer, 99, 0)


def test_prompts_are_lines_and_the_shortest_first() -> None:
    long = {"role": "user", "content": "Two\nlines,  and more of it?"}
    pairs = [{**PAIR, "messages": m} for m in ([USER, YES, USER], [long], [USER])]
    assert prompts(pairs, 8) == ["Ask?", "Two lines, and more of it?", "Ask?"]
    assert prompts(pairs, 1) == ["Ask?"]
