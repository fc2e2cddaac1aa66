"""What explains the difference of the mutual information of two responses."""

import numpy as np
import pytest

from bdpo_plugin.inspection.explained import conclusions, explain, is_refusal

RNG = np.random.default_rng(0)
PAIRS = 400
SORRY, HELP = "I'm sorry, but I can't help with that.", "Sure. First boil the water."


def found(apart, *, longer=None, refuses=None, labels=None):
    """The figures of pairs with this difference of MI, and with these properties or chance."""
    rejected = RNG.normal(size=len(apart))
    longer = RNG.integers(-9, 10, len(apart)) if longer is None else longer
    refuses = RNG.integers(0, 2, len(apart)) if refuses is None else refuses
    chosen_texts = [SORRY if refusal else HELP for refusal in refuses]
    return explain(
        (rejected + apart, rejected),
        (longer + 20, np.full(len(apart), 20)),
        (chosen_texts, [HELP] * len(apart)),
        labels,
    )


@pytest.mark.parametrize("what", ["length", "refusal", "label", None])
def test_what_makes_the_difference_is_found(what) -> None:
    """The difference is a signal of variance 1 and noise of variance 1: half of it is explained."""
    signal = RNG.choice([-1.0, 1.0], PAIRS)
    apart = signal * (what is not None) + RNG.normal(size=PAIRS)
    given = {
        "length": {"longer": (-3 * signal).astype(int)},
        "refusal": {"refuses": signal > 0},
        "label": {"labels": ["a" if one > 0 else "b" for one in signal]},
        None: {},
    }[what]
    figures = found(apart, **{"labels": list(RNG.choice(["a", "b"], PAIRS)), **given})
    for name in ("length", "refusal", "label"):
        assert figures.shares[name] == pytest.approx(0.5 * (name == what), abs=0.08), name
    assert figures.shares["together"] == pytest.approx(0.5 * (what is not None), abs=0.08)
    sentences = " ".join(conclusions(figures, "kind"))
    words = {"length": "follow length", "refusal": "follow refusals", "label": "`shuffled:kind"}
    wanted = words.get(what, "particular to each pair, or noise")
    assert wanted in sentences.replace("`bdpo_control: ", "`")
    if what == "length":
        assert "the shorter response has more" in sentences
    assert "Do not conclude" in sentences


def test_labels_of_each_pair_explain_nothing_by_their_number() -> None:
    apart = RNG.normal(size=PAIRS)
    labels = [str(number % 100) for number in range(PAIRS)]
    assert found(apart, labels=labels).shares["label"] < 0.12  # unadjusted it would be a quarter


@pytest.mark.parametrize("apart", [np.zeros(PAIRS), np.ones(3)])
def test_too_few_pairs_or_no_difference(apart) -> None:
    figures = found(apart)
    assert figures.shares == {}
    assert "nothing can be said about what explains it" in " ".join(conclusions(figures, None))


def test_shares_of_negative_ones() -> None:
    figures = explain(
        (np.array([-1.0, 1.0]), np.array([-1.0, -2.0])), (np.ones(2),) * 2, ([""] * 2,) * 2, None
    )
    assert figures.negative == (0.5, 1.0)
    assert figures.refusals == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        (SORRY, True),
        ("I cannot assist with this request.", True),
        ("Unfortunately, I am unable to do so.", True),
        ("I\u2019m really sorry to hear", True),
        (HELP, False),
        ("I can show you how.", False),
        ("I don't think so: here is why.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_their_beginning(text, refuses) -> None:
    assert is_refusal(text) is refuses
