"""What makes a pair useless, and what is said of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo_plugin.data.pairs import Pair, Side, check_pairs, split_sequence
from bdpo_plugin.settings import BDPOError

BOS = 1


def pair(prompt, chosen, rejected, rejected_prompt=None):
    sides = ((prompt, chosen), (rejected_prompt or prompt, rejected))
    return Pair(*(Side(np.array(p), np.array(r, dtype=np.int64)) for p, r in sides))


GOOD = pair([BOS, 5], [6, 7], [8])
EMPTY = pair([5], [6], [])
IDENTICAL = pair([5], [6, 7], [6, 7])
DOUBLED = pair([BOS, BOS, 5], [6], [7])


def test_a_good_dataset():
    report = check_pairs([GOOD] * 3, "train", lengths=[(2, 1)] * 3, bos=BOS)
    assert (report.total, report.rows, report.dropped, report.lines()) == (3, {}, set(), [])
    report.raise_if_nothing_left()


def test_each_problem_is_counted_with_its_rows():
    pairs = [GOOD, EMPTY, IDENTICAL, DOUBLED, GOOD, EMPTY, GOOD]
    lengths = [(2, 1), (1, 0), (2, 2), (1, 1), (2, 1), (1, 9), (2, 1)]
    report = check_pairs(pairs, "train", lengths=lengths, bos=BOS, prompt_boundary_mismatch=[4])
    assert report.rows == {
        "empty": [1],
        "identical": [2],
        "double_bos": [3],
        "boundary": [4],
        "truncated": [5],
    }
    assert report.dropped == {1, 2, 5}
    lines = report.lines()
    assert len(lines) == 5
    for row, words in (
        ("rows 1)", "1 of 7 pairs of the train data: a response is empty (dropped"),
        ("rows 2)", "chosen and rejected are identical (dropped"),
        ("rows 3)", "two BOS tokens (kept"),
        ("rows 4)", "not where the response begins (kept"),
        ("rows 5)", "left after truncation (dropped"),
    ):
        assert [line for line in lines if row in line and words in line]


def test_only_five_rows_are_given_as_examples():
    (line,) = check_pairs([IDENTICAL] * 8, "eval").lines()
    assert line.startswith("8 of 8 pairs of the eval data")
    assert "rows 0, 1, 2, 3, 4, ..." in line


def test_nothing_is_left():
    report = check_pairs([IDENTICAL, EMPTY], "train")
    with pytest.raises(BDPOError, match=r"No pair of the train data.*identical.*empty|empty.*iden"):
        report.raise_if_nothing_left()
    check_pairs([IDENTICAL, EMPTY, GOOD], "train").raise_if_nothing_left()


@pytest.mark.parametrize("side", [0, 1])
def test_either_side_may_be_empty(side):
    responses = [[6], [7]]
    responses[side] = []
    assert check_pairs([pair([5], *responses)], "train").dropped == {0}
    assert "truncated" in check_pairs([pair([5], *responses)], "train", lengths=[(3, 3)]).rows


def test_both_empty_is_empty_not_identical():
    assert list(check_pairs([pair([5], [], [])], "train").rows) == ["empty"]


def test_identical_responses_to_prompts_cut_differently():
    """The same answer twice teaches nothing, however long the prompt before it is."""
    assert check_pairs([pair([4, 5], [6], [6], [5])], "train").dropped == {0}


def test_one_bos_is_right_and_a_bos_of_the_text_too():
    fine = [pair([BOS, 5, BOS], [6], [7]), pair([5, BOS, BOS], [6], [7]), pair([BOS], [6], [7])]
    assert not check_pairs(fine, "train", bos=BOS).rows
    assert not check_pairs([DOUBLED], "train").rows
    assert check_pairs([pair([BOS, 5], [6], [7], [BOS, BOS])], "train", bos=BOS).rows


@given(prompt=st.integers(1, 5), response=st.integers(0, 5))
def test_split_sequence(prompt, response):
    ids = list(range(10, 10 + prompt + response))
    side = split_sequence(ids, [False] * prompt + [True] * response)
    assert side.prompt_ids.tolist() == ids[:prompt]
    assert side.completion_ids.tolist() == ids[prompt:]
    assert side.prompt_ids.dtype == side.completion_ids.dtype == np.int64


def test_a_first_token_is_prompt():
    """Nothing predicts it."""
    side = split_sequence([5, 6, 7], [True, True, True])
    assert (side.prompt_ids.tolist(), side.completion_ids.tolist()) == ([5], [6, 7])


def test_an_empty_sequence():
    side = split_sequence([], [])
    assert (len(side.prompt_ids), len(side.completion_ids)) == (0, 0)


@pytest.mark.parametrize("completion_mask", [[0, 1, 0], [1, 0, 0], [1, 0, 1]])
def test_tokens_trained_on_that_are_not_the_end(completion_mask):
    with pytest.raises(ValueError, match="not contiguous"):
        split_sequence([5, 6, 7], completion_mask)
