"""What is wrong with a row as the user wrote it, and how all of it is told at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo_plugin.data.raw_rows import MessageForm, RowCheck, RowReport, raise_problems, raise_row
from bdpo_plugin.settings import BDPOError


def said(content="yes", role="assistant", **more):
    return [{"role": role, "content": content, **more}]


def text(**changes):
    return {"prompt": "Why?", "chosen": "yes", "rejected": "no", **changes}


def messages(**changes):
    row = {"prompt": said("Why?", "user"), "chosen": said("yes"), "rejected": said("no")}
    return {**row, **changes}


def without(row, *columns):
    return {column: value for column, value in row.items() if column not in columns}


WHOLE = {"chosen": said("Why?", "user") + said("a"), "rejected": said("Why?", "user") + said("b")}


@pytest.mark.parametrize(
    "row",
    [
        text(),
        text(chosen="", rejected=" \x00\t"),
        text(chosen="naïve \U0001f600 \u200d"),
        messages(),
        messages(chosen=[]),  # teaches nothing, which is for others to say
        messages(prompt=said("Be brief.", "system") + said("Why?", "user")),
        messages(chosen=said(None, tool_calls=[{"function": {"name": "f"}}])),
        messages(tools='[{"type": "function"}]', chat_template_kwargs={"thinking": False}),
        messages(tools=None),
        WHOLE,
        without(text(chosen="Why? yes", rejected="Why? no"), "prompt"),
    ],
)
def test_a_pair_is_a_pair(row):
    assert not RowCheck()(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (without(text(), "chosen"), "no `chosen`, only 'prompt', 'rejected'"),
        (without(text(), "chosen", "rejected"), "no `rejected`"),
        (text(chosen=None), "`chosen` is None"),
        (text(prompt=None), "`prompt` is None"),
        (text(rejected=3), "`rejected` is a number"),
        (text(rejected=float("nan")), "`rejected` is a number"),
        (messages(chosen={"role": ["assistant"], "content": ["yes"]}), "`chosen` is a dict"),
        (messages(prompt=[]), "`prompt` is an empty list"),
        (messages(chosen=["yes"]), "a message of `chosen` is of type str"),
        (messages(chosen=[None]), "a message of `chosen` is None"),
        (messages(prompt=[{"from": "human", "value": "Why?"}]), "has no `role` (its keys: 'from'"),
        (messages(prompt=[{"role": "user"}]), "a message of `prompt` has no `content`"),
        (messages(chosen=said(role=None)), "the `role` of a message of `chosen` is None"),
        (messages(chosen=said(role=1)), "the `role` of a message of `chosen` is a number"),
        (messages(chosen=said(None)), "the `content` of a message of `chosen` is None"),
        (messages(chosen=said(4)), "the `content` of a message of `chosen` is a number"),
        (messages(chosen=said([{"type": "text", "text": "a"}])), "is a list of parts"),
        (messages(chosen=said([{"type": "image"}])), "is a list, not text"),
        (messages(chosen=said([{"type": "text"}])), "is a list, not text"),
        (text(chosen="a\ud800"), "`chosen` has half of a surrogate pair"),
        (messages(chosen=said("\udfff")), "`content` of a message of `chosen` has half"),
        (messages(prompt="Why?"), "`prompt` is text, `chosen` is a list of messages"),
        (text(rejected=said("no")), "`rejected` is a list of messages"),
        (without(messages(), "prompt"), "no `prompt`, and `chosen` and `rejected` do not begin"),
        (without(text(), "prompt"), "no `prompt`, and `chosen` and `rejected` do not begin"),
        (messages(chat_template_kwargs=None), "`chat_template_kwargs` is None"),
        (messages(tools="{"), "`tools` is text, but not JSON"),
        (messages(tools=3), "`tools` is a number"),
    ],
)
def test_what_is_no_pair(row, words):
    problems = RowCheck()(row)
    assert any(words in told for told, _ in problems), problems
    assert all(remedy.endswith(".") for _, remedy in problems)


def test_parts_are_text_where_the_template_reads_them():
    row = messages(chosen=said([{"type": "text", "text": "a"}]))
    assert not RowCheck(lambda: True)(row)
    row = messages(chosen=said([{"type": "text", "text": "\ud800"}]))
    assert RowCheck(lambda: True)(row)


def test_the_first_row_decides_for_text_or_messages():
    check = RowCheck()
    assert not check(text())
    ((words, _),) = check(messages())
    assert words == "the row is a list of messages, and the first one is text"


def test_a_prompt_beside_whole_conversations():
    ((_, remedy),) = RowCheck()({"prompt": "Why?", **WHOLE})
    assert "remove the column `prompt`" in remedy


def test_all_is_told_at_once():
    report = RowReport("train", total=9)
    check = RowCheck()
    for row, wrong in enumerate([text()] + [text(chosen=None)] * 7 + [text(prompt=2)]):
        report.add(row, check(wrong))
    other = RowReport("eval", general=["It has no rows."])
    with pytest.raises(BDPOError) as raised:
        raise_problems([report, RowReport("fine", total=3), other])
    assert str(raised.value).splitlines() == [
        "The train data cannot be trained on:",
        "- 7 of 9 rows: `chosen` is None (rows 1, 2, 3, 4, 5, ...). Remove these rows, or fill "
        "them in.",
        "- 1 of 9 rows: `prompt` is a number, neither text nor a list of messages (rows 8). "
        "Write text, or a list of messages {'role': ..., 'content': ...}.",
        "The eval data cannot be trained on:",
        "- It has no rows.",
        "Nothing has been computed.",
    ]
    raise_problems([RowReport("fine", total=3)])


def test_many_kinds_of_problem_stay_readable():
    report = RowReport("train", total=40)
    for row in range(40):
        report.add(row, [(f"problem {row}", "Mend it.")])
    assert len(report.lines()) == 11
    assert report.lines()[-1] == "30 more kinds of problem (rows 10, 11, 12, 13, 14, ...)."


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "tools"]), anything))
def test_any_row_is_judged(row):
    """Never an exception, and what passes is text throughout or messages throughout."""
    if RowCheck()(row):
        return
    sides = [row[column] for column in ("prompt", "chosen", "rejected") if column in row]
    assert len({type(side) for side in sides}) == 1
    for side in sides:
        side.encode() if isinstance(side, str) else [message["role"].encode() for message in side]


FORM = MessageForm("from", "value", ("human", "gpt"), "Name keys.", "Name roles.", calls=False)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"from": "human", "value": ""}, []),
        ({"from": "gpt", "value": "Yes.", "weight": 1}, []),
        (None, ["is None, not a dict with `from` and `value`. Write a dict with these keys."]),
        (
            {"role": "human", "value": None},
            [
                "has no `from` (its keys: 'role', 'value'). Name keys.",
                "the `value` of a message of `chosen` is None. Remove these rows, or fill them in.",
            ],
        ),
        ({"from": "user", "value": "Why?"}, ["`chosen` is 'user'. Name roles."]),
        ({"from": 3, "value": "Why?"}, ["the `from` of a message of `chosen` is a number."]),
        ({"from": "gpt", "value": None, "tool_calls": [{}]}, ["the `value` of a message"]),
    ],
)
def test_messages_of_a_host_with_keys_of_its_own(message, told):
    found = [". ".join(problem) for problem in FORM.problems("chosen", message)]
    assert len(found) == len(told)
    assert all(words in said for words, said in zip(told, found, strict=True))


def test_a_host_may_take_a_call_for_text():
    form = MessageForm("from", "value", (), "", "", calls=True)
    assert not list(form.problems("chosen", {"from": "x", "value": None, "tool_calls": [{}]}))
    assert list(form.problems("chosen", {"from": "x", "value": None}))


def test_a_row_of_a_stream_is_told_by_its_position():
    raise_row(3, "train", [])
    with pytest.raises(BDPOError) as raised:
        raise_row(3, "train", [("`chosen` is None", "Fill it in."), ("`tools` is a dict", "No.")])
    assert str(raised.value) == (
        "Row 3 of the train data, a stream, cannot be trained on: `chosen` is None. Fill it in.; "
        "`tools` is a dict. No. Filter such rows out of the stream."
    )
