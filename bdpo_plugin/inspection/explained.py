"""What the mutual information of a training set says, and what it does not, for `bdpo mi`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

#: Fewer pairs than this say nothing about what explains a difference.
_FEW = 30
#: A share of the variance above which the difference is called explained "in good part".
_MUCH = 0.25
#: How refusals begin. A rule of thumb: it misses unusual ones.
_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am) (?:very |really |so )?(?:sorry|afraid)|sorry|i apologi[sz]e"
    r"|unfortunately,? i"
    r"|i (?:can(?:'?t|not| not)|won'?t|will not|am not able|am unable|must decline)"
    r"|i'?m (?:not able|unable|not comfortable)|no, i (?:can|won|will)|as an ai)",
    re.IGNORECASE,
)


class Explained(NamedTuple):
    """Figures about the B pairs of a training set.

    Attributes:
        negative: the shares of chosen and of rejected responses with a mutual information below 0.
        shares: what explains I_w - I_l -> the share of its variance, adjusted for chance (0 to 1).
            Empty if there are too few pairs. ``together`` is that of all.
        slope: the sign of the correlation of I_w - I_l with the difference of the lengths.
        refusals: the shares of chosen and of rejected responses that begin as refusals do.
    """

    negative: tuple[float, float]
    shares: dict[str, float]
    slope: float
    refusals: tuple[float, float]


def is_refusal(text: str) -> bool:
    """Whether a response begins as refusals do."""
    return _REFUSAL.match(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None


def explain(
    mi: tuple[np.ndarray, np.ndarray],
    tokens: tuple[np.ndarray, np.ndarray],
    responses: tuple[Sequence[str], Sequence[str]],
    labels: Sequence[str] | None,
) -> Explained:
    """Computes how much of I_w - I_l length, refusal and label explain.

    It is the share of the variance by a linear model, adjusted for the number of its terms.

    Args:
        mi: (B,) mutual information of the chosen and of the rejected responses.
        tokens: (B,) numbers of tokens of the responses.
        responses: (B,) texts of the responses.
        labels: (B,) labels; None if there are none.
    """
    chosen, rejected = mi
    refuses = [np.array([is_refusal(text) for text in texts], dtype=float) for texts in responses]
    longer = tokens[0].astype(float) - tokens[1]
    terms = {"length": longer[:, None], "refusal": (refuses[0] - refuses[1])[:, None]}
    if labels is not None:
        names = sorted(set(labels))[1:]  # the first one is where no column is 1
        terms["label"] = np.array([[name == label for name in names] for label in labels], float)
    apart = chosen - rejected
    shares = {}
    if len(apart) >= _FEW and np.ptp(apart) > 0:
        shares = {name: _share(apart, columns) for name, columns in terms.items()}
        shares["together"] = _share(apart, np.hstack(list(terms.values())))
    return Explained(
        (float((chosen < 0).mean()), float((rejected < 0).mean())),
        shares,
        float(np.sign(((apart - apart.mean()) * (longer - longer.mean())).sum())),
        (float(refuses[0].mean()), float(refuses[1].mean())),
    )


def _share(values: np.ndarray, columns: np.ndarray) -> float:
    """The adjusted share of the variance of (B,) values that (B, K) columns explain, from 0."""
    design = np.hstack([np.ones((len(values), 1)), columns])
    rank = np.linalg.matrix_rank(design)
    if rank == 1 or len(values) <= rank:
        return 0.0
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest = ((values - fitted) ** 2).sum() / ((values - values.mean()) ** 2).sum()
    return max(0.0, float(1 - rest * (len(values) - 1) / (len(values) - rank)))


def conclusions(found: Explained, label: str | None) -> Iterator[str]:
    """Yields sentences: what the figures say, what to conclude, and what not."""
    chosen, rejected = found.negative
    yield (
        f"The MI is negative in {chosen:.1%} of the chosen and {rejected:.1%} of the rejected "
        "responses: the model finds them less likely after their prompt than after the null prompt."
    )
    if not found.shares:
        yield (
            f"With fewer than {_FEW} pairs, or no difference between their MI, nothing can be said "
            "about what explains it."
        )
    else:
        direction = "longer" if found.slope > 0 else "shorter"
        by = {
            "length": f"the difference in length {{}} (the {direction} response has more)",
            "refusal": "whether one of the two is a refusal {}",
            "label": f"the label `{label}` {{}}",
            "together": "all together {}",
        }
        parts = [by[name].format(f"{share:.0%}") for name, share in found.shares.items()]
        yield f"Of the variance of MI chosen - MI rejected, these explain: {'; '.join(parts)}."
        yield _advice(found, label)
    yield (
        "Do not conclude that an imbalanced pair is wrong, hard or valuable, nor that B-DPO will "
        "train a better model than DPO: no figure here says so, only runs of both and of a control."
    )


def _advice(found: Explained, label: str | None) -> str:
    shares = {name: share for name, share in found.shares.items() if name != "together"}
    largest = max(shares, key=lambda name: shares[name])
    if max(found.shares.values()) < _MUCH:
        return (
            "Conclude that the weights of B-DPO will hardly be those of length, refusal or label: "
            "what they follow here is particular to each pair, or noise."
        )
    words = {"length": "length", "refusal": "refusals", "label": f"the label `{label}`"}[largest]
    control = f"shuffled:{label}" if largest == "label" else "shuffled"
    return (
        f"Conclude that the weights of B-DPO will in good part follow {words}: before you put a "
        f"result down to understanding, train a control too (`bdpo_control: {control}`)."
    )
