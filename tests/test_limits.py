"""What a refusal of a host's key says, and which values are none."""

import pytest

from bdpo_plugin.limits import OFF, Limit, check_limits, check_no_keys
from bdpo_plugin.settings import BDPOError

LIMITS = (
    Limit("fused", "there is no place for the weights"),
    Limit("ranks", "each has rows of its own", (1, *OFF), "Set it to 1."),
    Limit("power", "it would weigh the tokens", (), verdict="has no effect"),
)


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict.fromkeys(("fused", "ranks", "power", "another")),
        {"fused": False, "ranks": 1, "another": True},
        {"fused": "", "ranks": 0},
        {"fused": []},
        {"fused": {}},
        {"fused": 0.0},
    ],
)
def test_honoured(values):
    check_limits(values, LIMITS, "`method: ours`")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"fused": True},
            "`fused: True` cannot be used with `method: ours`: there is no place for the weights. "
            "Remove it.",
        ),
        (
            {"fused": False, "ranks": 2},
            "`ranks: 2` cannot be used with `method: ours`: each has rows of its own. Set it to 1.",
        ),
        (
            {"power": 0.0},
            "`power: 0.0` has no effect with `method: ours`: it would weigh the tokens. Remove it.",
        ),
    ],
)
def test_refused(values, said):
    with pytest.raises(BDPOError) as refusal:
        check_limits(values, LIMITS, "`method: ours`")
    assert str(refusal.value) == said


def test_keys_of_a_run_that_does_not_ask_for_the_method():
    check_no_keys({"bdpo_alpha": None, 5: 1, "alpha": 2}, "method: theirs", "method: ours")
    with pytest.raises(BDPOError) as refusal:
        check_no_keys(
            {"beta": 1, "bdpo_alpha": 0, "bdpo_scaling": False}, "method: theirs", "method: ours"
        )
    assert str(refusal.value) == (
        "`bdpo_alpha` has no effect with `method: theirs`. Write `method: ours`, or remove: "
        "bdpo_alpha, bdpo_scaling. (Plain DPO with the same YAML: `bdpo_alpha: 0`.)"
    )
