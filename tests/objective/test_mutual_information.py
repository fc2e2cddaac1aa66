"""Section 3 of the method: known numbers, a model solved in closed form, and the properties."""

import inspect
import math
from itertools import product

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from torch.testing import assert_close

from bdpo_plugin.objective import mutual_information
from bdpo_plugin.objective.mutual_information import information_gain

QUERIES, SYMBOLS, NULL = 4, 5, 4  # the query is one of the tokens 0..3, token 4 stands for none


class Mixture:
    """A language model solved in closed form: a query picks a die, the response rolls it.

    pi(y | x) = prod_t p_x(y_t), and without a query pi(y) = sum_x q_x pi(y | x). A prompt is the
    query's token and one scaffold token.
    """

    def __init__(self, seed: int, one_die: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.prior = rng.dirichlet(np.ones(QUERIES))
        self.dice = rng.dirichlet(np.ones(SYMBOLS), size=QUERIES)
        if one_die:
            self.dice[:] = self.dice[0]

    def cond_logps(self, query: int, response: list[int]) -> float:
        return sum(math.log(self.dice[query][token]) for token in response)

    def null_logps(self, response: list[int]) -> float:
        return math.log(
            sum(self.prior[x] * math.exp(self.cond_logps(x, response)) for x in range(QUERIES))
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """The next-token logits of the autoregressive form, each row off by its own constant."""
        belief = self.prior if ids[0] == NULL else np.eye(QUERIES)[ids[0]]
        rows = [np.zeros(SYMBOLS)]
        for i, token in enumerate(ids[1:]):
            if i > 0:
                belief = belief * self.dice[:, token] / (belief @ self.dice[:, token])
            rows.append(np.log(belief @ self.dice) + 0.7 * i)
        return np.array(rows)


seeds = st.integers(0, 2**32 - 1)
queries = st.integers(0, QUERIES - 1)
responses = st.lists(st.integers(0, SYMBOLS - 1), min_size=1, max_size=6)


def prompt_of(query: int) -> list[int]:
    return [query, 0]


def test_signature() -> None:
    assert str(inspect.signature(mutual_information)) == (
        "(cond_logps: 'Tensor', null_logps: 'Tensor', lengths: 'Tensor', *, "
        "normalize: 'bool' = True) -> 'Tensor'"
    )


def test_known_numbers() -> None:
    """-3 nats with the query, -7 without, 4 tokens: 4 nats, 1 nat per token; and a negative one."""
    cond, null, lengths = torch.tensor([-3.0, -8]), torch.tensor([-7.0, -6]), torch.tensor([4, 2])
    assert mutual_information(cond, null, lengths).tolist() == [1, -1]
    assert mutual_information(cond, null, lengths, normalize=False).tolist() == [4, -2]


@given(seeds, queries, responses, st.booleans())
def test_closed_form_pointwise(seed: int, query: int, response: list[int], normalize: bool) -> None:
    """Property 7: the estimate from a model's logits is the closed form."""
    model = Mixture(seed)
    closed = model.cond_logps(query, response) - model.null_logps(response)
    if normalize:
        closed /= len(response)
    cond = truth.response_logps(model.logits, prompt_of(query), response)
    null = truth.response_logps(model.logits, prompt_of(NULL), response)
    ours = mutual_information(
        torch.tensor([cond], dtype=torch.float64),
        torch.tensor([null], dtype=torch.float64),
        torch.tensor([len(response)]),
        normalize=normalize,
    )
    assert ours.item() == pytest.approx(closed, abs=1e-9)
    by_truth = truth.pointwise_mi(
        model.logits, prompt_of(query), prompt_of(NULL), response, normalize
    )
    assert by_truth == pytest.approx(closed, abs=1e-9)


def gain(model: Mixture, query: int, response: list[int]) -> torch.Tensor:
    """Our information gain at each position of the response."""

    def rows(prompt: list[int]) -> torch.Tensor:
        logits = model.logits([*prompt, *response])
        return torch.tensor(logits[len(prompt) - 1 : -1])

    return information_gain(*(rows(prompt_of(q)).log_softmax(-1) for q in (query, NULL)))


@given(seeds, queries)
def test_closed_form_expected(seed: int, query: int) -> None:
    """Averaged over y ~ pi(y | x), the summed gain is KL( pi(y | x) || pi(y) ): the chain rule."""
    model = Mixture(seed)
    closed = estimate = 0.0
    for response in product(range(SYMBOLS), repeat=3):
        log_p = model.cond_logps(query, list(response))
        closed += math.exp(log_p) * (log_p - model.null_logps(list(response)))
        estimate += math.exp(log_p) * gain(model, query, list(response)).sum().item()
    assert estimate == pytest.approx(closed, abs=1e-4)


@given(seeds, queries, responses)
def test_gain_agrees_with_truth(seed: int, query: int, response: list[int]) -> None:
    model = Mixture(seed)
    ours = gain(model, query, response)
    prompts = prompt_of(query), prompt_of(NULL)
    assert ours.shape == (len(response),)
    assert (ours >= -1e-5).all()
    assert ours.mean().item() == pytest.approx(
        truth.expected_mi(model.logits, *prompts, response), abs=1e-4
    )
    assert ours.sum().item() == pytest.approx(
        truth.expected_mi(model.logits, *prompts, response, normalize=False), abs=1e-4
    )


@given(seeds, queries, responses)
def test_no_dependence_on_the_query_is_no_information(
    seed: int, query: int, response: list[int]
) -> None:
    """Property 7: with one die for all queries both estimators are 0."""
    model = Mixture(seed, one_die=True)
    prompts = prompt_of(query), prompt_of(NULL)
    assert truth.pointwise_mi(model.logits, *prompts, response) == pytest.approx(0, abs=1e-9)
    assert gain(model, query, response).tolist() == pytest.approx([0] * len(response), abs=1e-5)


@given(st.lists(st.floats(-1e4, 0, width=32), min_size=1, max_size=8), st.booleans())
def test_equal_logps_are_exactly_zero(logps: list[float], normalize: bool) -> None:
    x = torch.tensor(logps)
    lengths = torch.arange(1, len(x) + 1)
    assert mutual_information(x, x.clone(), lengths, normalize=normalize).eq(0).all()


def test_rows_do_not_see_each_other() -> None:
    """Property 6, of the arithmetic: a row alone, in a batch, or in another order is the same."""
    torch.manual_seed(0)
    cond, null, lengths = torch.randn(16), torch.randn(16), torch.randint(1, 50, (16,))
    whole = mutual_information(cond, null, lengths)
    order = torch.randperm(16)
    assert torch.equal(mutual_information(cond[order], null[order], lengths[order]), whole[order])
    assert torch.equal(mutual_information(cond[3:4], null[3:4], lengths[3:4]), whole[3:4])


def test_is_a_constant() -> None:
    cond, null = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not mutual_information(cond, null, torch.ones(2)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_subtracted_in_float32(dtype: torch.dtype) -> None:
    cond, null = torch.tensor([-1000.0], dtype=dtype), torch.tensor([-3.015625], dtype=dtype)
    ours = mutual_information(cond, null, torch.tensor([1]))
    assert_close(ours, cond.float() - null.float(), rtol=0, atol=0)


def test_float64_stays_float64() -> None:
    x = torch.tensor([1e-12], dtype=torch.float64)
    assert mutual_information(x, 0 * x, torch.tensor([1])).item() == 1e-12


def test_refusals() -> None:
    shapes = "cond_logps, null_logps and lengths must be three (B,) tensors, got "
    two, three, square = torch.zeros(2), torch.zeros(3), torch.zeros(2, 1)
    for arguments, words in (
        ((two, two, three), "(2,), (2,), (3,)"),
        ((two, three, two), "(2,), (3,), (2,)"),
        ((three, two, two), "(3,), (2,), (2,)"),
        ((square, square, square), "(2, 1), (2, 1), (2, 1)"),
    ):
        with refused(shapes + words):
            mutual_information(*arguments)
    for lengths, row, length in (([3, 0], 1, 0), ([1, 2, 0, 0], 2, 0), ([-1], 0, -1)):
        with refused(
            f"response {row} of the batch has length {length}: an empty response has no mutual "
            "information with its query"
        ):
            zeros = torch.zeros(len(lengths))
            mutual_information(zeros, zeros, torch.tensor(lengths))


def test_a_token_that_the_model_excludes_adds_nothing() -> None:
    cond, null = torch.randn(2, 3, 7).log_softmax(-1)
    wanted = information_gain(cond, null)
    excluded = torch.full((3, 2), -torch.inf)
    gain = information_gain(torch.cat([cond, excluded], 1), torch.cat([null, excluded], 1))
    torch.testing.assert_close(gain, wanted)
