"""Sections 5 and 6 of the method: known numbers, the properties, extremes, refusals."""

import inspect
import math

import pytest
import torch
import truth
from hypothesis import assume, given
from hypothesis import strategies as st
from refusals import refused

from bdpo_plugin.objective import BalanceWeights, balance_weights

WEIGHTINGS = ["softmax", "power"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

mis = st.floats(-5, 5)
alphas = st.floats(0, 5)
weightings = st.sampled_from(WEIGHTINGS)


def weigh(mi_chosen: float, mi_rejected: float, dtype=torch.float64, **options) -> BalanceWeights:
    """The weights of one pair."""
    return balance_weights(
        torch.tensor([mi_chosen], dtype=dtype), torch.tensor([mi_rejected], dtype=dtype), **options
    )


def numbers(weights: BalanceWeights) -> list[float]:
    return [field.item() for field in weights]


def test_signature() -> None:
    assert str(inspect.signature(balance_weights)) == (
        "(mi_chosen: 'Tensor', mi_rejected: 'Tensor', *, alpha: 'float' = 1.5, "
        "weighting: 'str' = 'softmax', balance: 'bool' = True, scaling: 'bool' = True) "
        "-> 'BalanceWeights'"
    )
    assert BalanceWeights._fields == ("chosen", "rejected", "scale")


def test_softmax_by_hand() -> None:
    """I = (1, 0), alpha 1.5: w_w = 2 / (1 + e^1.5) = 0.364851, w_l = 1.635149,
    s = sqrt(2 / (0.133116 + 2.673713)) = 0.844126."""
    assert numbers(weigh(1, 0)) == pytest.approx([0.364851, 1.635149, 0.844126], abs=1e-6)


def test_power_by_hand() -> None:
    """I = (0.3, 0.1), alpha 1: w_w = 2 * 0.1 / 0.4 = 0.5, w_l = 1.5, s = sqrt(2 / 2.5).
    alpha 2: w_w = 2 * 0.01 / 0.1 = 0.2, w_l = 1.8, s = sqrt(2 / 3.28)."""
    ours = weigh(0.3, 0.1, alpha=1, weighting="power")
    assert numbers(ours) == pytest.approx([0.5, 1.5, math.sqrt(0.8)])
    ours = weigh(0.3, 0.1, alpha=2, weighting="power")
    assert numbers(ours) == pytest.approx([0.2, 1.8, math.sqrt(2 / 3.28)])


@given(mis, mis, alphas, weightings, st.booleans(), st.booleans())
def test_agrees_with_truth(i_w, i_l, alpha, weighting, balance, scaling) -> None:
    options = {
        "alpha": alpha, "weighting": weighting, "balance": balance, "scaling": scaling
    }  # fmt: skip
    expected = truth.balance_pair(i_w, i_l, **options)
    assert numbers(weigh(i_w, i_l, **options)) == pytest.approx(list(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@given(mis, mis, weightings)
def test_alpha_zero_is_exactly_dpo(dtype, i_w, i_l, weighting) -> None:
    assert numbers(weigh(i_w, i_l, dtype, alpha=0, weighting=weighting)) == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(mis, st.floats(0, 1e3), weightings)
def test_balanced_pair_is_exactly_dpo(dtype, mi, alpha, weighting) -> None:
    """Property 2, of the weights."""
    assert numbers(weigh(mi, mi, dtype, alpha=alpha, weighting=weighting)) == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(mis, mis, alphas, weightings)
def test_swapping_the_mi_swaps_the_weights(dtype, i_w, i_l, alpha, weighting) -> None:
    """Property 3, to the last bit."""
    one = weigh(i_w, i_l, dtype, alpha=alpha, weighting=weighting)
    other = weigh(i_l, i_w, dtype, alpha=alpha, weighting=weighting)
    assert numbers(other) == [one.rejected.item(), one.chosen.item(), one.scale.item()]


@pytest.mark.parametrize(("weighting", "lowest"), [("softmax", -5), ("power", 0.05)])
@given(data=st.data(), alpha=st.floats(0.01, 1.5), step=st.floats(1e-3, 1))
def test_weight_strictly_falls_as_its_own_mi_grows(weighting, lowest, data, alpha, step) -> None:
    """Property 3, on both sides."""
    mine, other = data.draw(st.floats(lowest, 5)), data.draw(st.floats(lowest, 5))
    options = {"alpha": alpha, "weighting": weighting}
    before, after = weigh(mine, other, **options), weigh(mine + step, other, **options)
    assert after.chosen < before.chosen
    assert after.rejected > before.rejected
    before, after = weigh(other, mine, **options), weigh(other, mine + step, **options)
    assert after.rejected < before.rejected
    assert after.chosen > before.chosen


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@given(lead=st.floats(10, 80), step=st.floats(0.5, 5))
def test_weight_of_a_far_better_understood_response_still_falls(side, lead, step) -> None:
    """In float32, where 2 - w of the other response is 0 from a lead of 17 on."""

    def weight(own_mi: float) -> float:
        pair = (own_mi, 0) if side == "chosen" else (0, own_mi)
        return getattr(weigh(*pair, torch.float32, alpha=1), side).item()

    assert 0 < weight(lead + step) < weight(lead)


@given(mis, mis, alphas, weightings)
def test_sum_and_range(i_w, i_l, alpha, weighting) -> None:
    """Property 3, and the range of the scaling factor: 1 exactly where the pair is balanced."""
    w_w, w_l, s = numbers(weigh(i_w, i_l, alpha=alpha, weighting=weighting))
    assert w_w + w_l == pytest.approx(2, abs=1e-12)
    assert 0 <= w_w <= 2
    assert 1 / math.sqrt(2) - 1e-12 <= s <= 1 + 1e-12
    assume(abs(w_w - w_l) > 1e-3)
    assert s < 1
    assert (w_w < w_l) == (i_w > i_l)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("alpha", [0, 1e-6, 1.5, 1e3, 1e30, torch.finfo(torch.float32).max])
def test_extremes_stay_finite(dtype, weighting, alpha) -> None:
    """Also where alpha times the advantage, or the advantage itself, is more than float32 holds."""
    values = [torch.finfo(dtype).min, -1e3, -1, 0, 1e-6, 0.05, 1, 1e3, torch.finfo(dtype).max]
    grid = torch.tensor(values, dtype=dtype)
    chosen, rejected = grid.repeat_interleave(len(grid)), grid.repeat(len(grid))
    weights = balance_weights(chosen, rejected, alpha=alpha, weighting=weighting)
    assert all(field.isfinite().all() for field in weights)
    assert (weights.chosen + weights.rejected - 2).abs().max() <= 1e-6
    assert min(weights.chosen.min(), weights.rejected.min()) >= 0
    assert weights.scale.min() >= 1 / math.sqrt(2) - 1e-6
    assert weights.scale.max() <= 1


@given(st.floats(-5, 0.05), st.floats(-5, 5), alphas)
def test_power_floors_each_mi(low, other, alpha) -> None:
    options = {"alpha": alpha, "weighting": "power"}
    assert numbers(weigh(low, other, **options)) == numbers(weigh(0.05, other, **options))
    assert numbers(weigh(other, low, **options)) == numbers(weigh(other, 0.05, **options))


def test_ablation_switches() -> None:
    """Section 7: "SF only" keeps the scale as computed, "BW only" keeps the weights."""
    both = weigh(1, 0)
    assert numbers(weigh(1, 0, balance=False)) == [1, 1, both.scale.item()]
    assert numbers(weigh(1, 0, scaling=False)) == [both.chosen.item(), both.rejected.item(), 1]
    assert numbers(weigh(1, 0, balance=False, scaling=False)) == [1, 1, 1]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_constants(weighting) -> None:
    mi = torch.tensor([0.3, 0.4], requires_grad=True)
    weights = balance_weights(mi, 2 * mi, weighting=weighting)
    assert not any(field.requires_grad for field in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_weighed_in_float32(dtype) -> None:
    rounded = torch.tensor([0.7, -0.2], dtype=dtype)
    ours = balance_weights(rounded, rounded.flip(0))
    expected = balance_weights(rounded.float(), rounded.flip(0).float())
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def test_pairs_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    chosen, rejected = torch.randn(16), torch.randn(16)
    whole = balance_weights(chosen, rejected)
    for i in range(16):
        alone = balance_weights(chosen[i : i + 1], rejected[i : i + 1])
        assert all(torch.allclose(a, w[i], rtol=1e-6) for a, w in zip(alone, whole, strict=True))


def test_refusals() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    shapes = "mi_chosen and mi_rejected must be two (B,) tensors, got "
    with refused(f"{shapes}(2,) and (3,)"):
        balance_weights(two, three)
    with refused(f"{shapes}() and ()"):
        balance_weights(torch.tensor(0.0), torch.tensor(0.0))
    with refused(f"{shapes}(2, 1) and (2, 1)"):
        balance_weights(two[:, None], two[:, None])
    with refused("unknown weighting 'softmx', must be 'softmax' or 'power'"):
        balance_weights(two, two, weighting="softmx")


@pytest.mark.parametrize(
    ("chosen", "rejected", "row"),
    [
        ([0, 0], [0, math.nan], 1),
        ([-math.inf, 0], [0, 0], 0),
        ([0, 0, math.inf], [0, math.nan, 0], 1),
        ([math.nan], [math.nan], 0),
    ],
)
def test_refuses_an_mi_that_is_not_finite(chosen, rejected, row) -> None:
    chosen, rejected = (torch.tensor(mi, dtype=torch.float32) for mi in (chosen, rejected))
    with refused(
        f"the mutual information of pair {row} of the batch is not finite: chosen "
        f"{chosen[row].item()}, rejected {rejected[row].item()}; the reference gave one of its "
        "tokens probability 0, or overflowed"
    ):
        balance_weights(chosen, rejected)


@pytest.mark.parametrize("alpha", [-0.1, math.inf, math.nan, 1e300])
def test_refuses_alpha_out_of_range(alpha) -> None:
    with refused(f"alpha must be finite and >= 0, got {alpha!r}"):
        balance_weights(torch.zeros(2), torch.zeros(2), alpha=alpha)
