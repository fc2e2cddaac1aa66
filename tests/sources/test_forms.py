"""Preference files of several forms."""

import json

import pytest

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import read_pairs

USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Ask?"), ("assistant", "Yes."), ("assistant", "No."))
)
PAIR = {"messages": [USER], "chosen": YES, "rejected": NO}


def as_hh(messages, answer):
    who = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{who[m['role']]}: {m['content']}" for m in [*messages, answer])


def as_sharegpt(message):
    who = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": who[message["role"]], "value": message["content"]}


FORMS = {
    "ours": lambda m, c, r: {"messages": m, "chosen": c, "rejected": r, "kind": "unsafe"},
    "hh-rlhf": lambda m, c, r: {"chosen": as_hh(m, c), "rejected": as_hh(m, r)},
    "llamafactory": lambda m, c, r: {
        "conversations": [as_sharegpt(turn) for turn in m],
        "chosen": as_sharegpt(c),
        "rejected": as_sharegpt(r),
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("lines", [True, False], ids=["JSON lines", "array"])
def test_forms(form, lines) -> None:
    talk = [USER, {"role": "assistant", "content": "Why?\n\nLine."}, USER]
    rows = [form(messages, YES, NO) for messages in ([USER], talk)]
    text = "\n".join(map(json.dumps, rows)) + "\n\n" if lines else json.dumps(rows, indent=1)
    more = {"kind": "unsafe"} if form is FORMS["ours"] else {}
    assert read_pairs(text, "f") == [PAIR | more, PAIR | {"messages": talk} | more]


def test_line_separators_in_a_text_end_no_line() -> None:
    odd = {**PAIR, "chosen": {**YES, "content": "a\u2028b\x85c"}}
    assert read_pairs(json.dumps(odd, ensure_ascii=False), "f") == [odd]


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "rejected": YES},
        {**PAIR, "chosen": {**YES, "content": " \n"}},
        {**PAIR, "messages": [USER, YES]},
        {"chosen": as_hh([USER], YES), "rejected": as_hh([{**USER, "content": "What?"}], NO)},
        {"chosen": as_hh([], USER), "rejected": as_hh([], {**USER, "content": "What?"})},
    ],
    ids=["equal", "empty", "no question", "other prompts", "no answer"],
)
def test_what_there_is_no_preference_in_is_left_out(row) -> None:
    rows = [row, FORMS["hh-rlhf"]([USER], YES, NO) if isinstance(row["chosen"], str) else PAIR]
    assert read_pairs("\n".join(map(json.dumps, rows)), "f") == [PAIR]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "3",
        '{"prompt": "Ask?", "good": "Yes."}',
        '{"chosen": "Yes.", "rejected": "No."}',
        '{"chosen": "", "rejected": ""}',
        '{"conversations": [{"from": "tool", "value": "7"}], "chosen": {}, "rejected": {}}',
        '{"messages": [], "chosen": {"role": "assistant"}, "rejected": {}}',
        '{"messages": [], "chosen": {"role": "assistant", "content": "Yes."}, "rejected": {}}',
    ],
)
def test_another_form_is_an_error_that_names_the_forms(text) -> None:
    with pytest.raises(BDPOError, match=r"(?s)my\.jsonl cannot be read.*messages.*Human: "):
        read_pairs(text, "my.jsonl")
