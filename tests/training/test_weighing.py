"""The weights of scored pairs: by the settings, by a control, by a callable of the user."""

import pytest
import torch

from bdpo_plugin import BalanceWeights, BDPOError
from bdpo_plugin.objective import balance_weights
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.training.weighing import asked_columns, weights_of

WON, LOST = torch.tensor([1.0, 0.2, 0.5]), torch.tensor([0.1, 0.9, 0.5])


def scores(won=WON, lost=LOST):
    logps, lengths = torch.tensor([-3.0, -4.0, -5.0]), torch.tensor([3, 4, 5])
    return PairScores(logps, logps, won, lost, lengths, lengths + 1, torch.ones(3).bool())


def test_by_the_settings():
    settings = BDPOSettings(alpha=0.7, weighting="power", scaling=False)
    wanted = balance_weights(WON, LOST, alpha=0.7, weighting="power", scaling=False)
    for ours, theirs in zip(weights_of(scores(), settings), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_by_a_control():
    swapped = weights_of(scores(), BDPOSettings(control="swapped"))
    assert torch.equal(swapped.chosen, balance_weights(LOST, WON).chosen)


def test_all_one_where_nothing_was_measured():
    nothing = torch.full((3,), torch.nan)
    for weights in weights_of(scores(nothing, nothing), BDPOSettings()):
        assert torch.equal(weights, torch.ones(3))


def test_a_callable_gets_what_it_asks_for():
    def weigh(won, lost, *, topic, rejected_tokens, factor=2.0):
        seen.append((topic, rejected_tokens.tolist()))
        return BalanceWeights(factor * won, lost, torch.ones_like(won))

    seen = []
    assert asked_columns(weigh) == ("topic",)
    assert asked_columns(None) == asked_columns(max) == ()
    weights = weights_of(scores(), BDPOSettings(), weigh=weigh, columns={"topic": ["a", "b", "c"]})
    assert seen == [(["a", "b", "c"], [4, 5, 6])]
    assert torch.equal(weights.chosen, 2 * WON)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.tensor([1.0, torch.inf, 1.0])])
def test_what_is_no_weight_is_refused(bad):
    def weigh(won, lost):
        return BalanceWeights(bad, won, lost)

    with pytest.raises(BDPOError, match=r"three finite tensors of the shape .*\(3,\)"):
        weights_of(scores(), BDPOSettings(), weigh=weigh)
