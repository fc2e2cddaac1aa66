"""The method once more, in float64 and plain loops, from the paper's side: the tests' truth.

Written from docs/method.md and, for the per-pair losses, from TRL's formulas. It shares no code
with bdpo_plugin and must import nothing of it: numpy and math only.

A model is a callable: token ids (a list of T ints) -> its logits, a (T, V) array, where row t
predicts token t + 1. Ids are plain lists of one sequence, without padding. Log-probabilities are
natural, summed over the response. Scores carry the names of the columns of the saved parquet.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Model = Callable[[list[int]], np.ndarray]


class PairScore(NamedTuple):
    """What the reference says of one pair: numbers of tokens, nats, and nats (per token)."""

    chosen_tokens: int
    rejected_tokens: int
    ref_chosen_logps: float
    ref_rejected_logps: float
    mi_chosen: float
    mi_rejected: float


class Balance(NamedTuple):
    """The weights of one pair, under the names of the parquet's columns."""

    weight_chosen: float
    weight_rejected: float
    scale: float


PLAIN_DPO = Balance(1.0, 1.0, 1.0)


# --- log-probabilities ---------------------------------------------------------------------


def log_softmax(row: np.ndarray) -> np.ndarray:
    """(V,) logits -> (V,) log-probabilities."""
    row = np.asarray(row, dtype=np.float64)
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


def response_log_distributions(model: Model, prompt: list[int], response: list[int]) -> list:
    """The log-distribution over the vocabulary before each token of the response."""
    logits = model([*prompt, *response])
    assert len(logits) == len(prompt) + len(response)
    return [log_softmax(logits[len(prompt) + t - 1]) for t in range(len(response))]


def logps_of(logits: np.ndarray, ids: list[int], prompt_length: int) -> float:
    """log pi(y | x) of the tokens after the first `prompt_length` ones, from (T, V) logits."""
    total = 0.0
    for position in range(prompt_length, len(ids)):
        total += float(log_softmax(logits[position - 1])[ids[position]])
    return total


def response_logps(model: Model, prompt: list[int], response: list[int]) -> float:
    """log pi(y | x)."""
    ids = [*prompt, *response]
    return logps_of(model(ids), ids, len(prompt))


# --- section 3: mutual information ---------------------------------------------------------


def pointwise_mi(
    model: Model, prompt: list[int], null: list[int], response: list[int], normalize: bool = True
) -> float:
    """log pi(y | x) - log pi(y | x0), divided by |y| where normalised."""
    mi = response_logps(model, prompt, response) - response_logps(model, null, response)
    return mi / len(response) if normalize else mi


def expected_mi(
    model: Model, prompt: list[int], null: list[int], response: list[int], normalize: bool = True
) -> float:
    """KL( pi(. | x, y_<t) || pi(. | x0, y_<t) ), the mean over t where normalised, else the sum."""
    given = response_log_distributions(model, prompt, response)
    without = response_log_distributions(model, null, response)
    total = 0.0
    for log_p, log_q in zip(given, without, strict=True):
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(response) if normalize else total


def score_pair(
    model: Model,
    prompt: list[int],
    null: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    estimator: str = "pointwise",
    normalize: bool = True,
) -> PairScore:
    """One pair, as training sees it (after truncation): the reference's row of the parquet."""
    mi = {"pointwise": pointwise_mi, "expected": expected_mi}[estimator]
    return PairScore(
        chosen_tokens=len(chosen),
        rejected_tokens=len(rejected),
        ref_chosen_logps=response_logps(model, prompt, chosen),
        ref_rejected_logps=response_logps(model, prompt, rejected),
        mi_chosen=mi(model, prompt, null, chosen, normalize),
        mi_rejected=mi(model, prompt, null, rejected, normalize),
    )


# --- sections 5 and 6: weights and scaling factor ------------------------------------------


def balance_pair(
    mi_chosen: float,
    mi_rejected: float,
    *,
    alpha: float = 1.5,
    weighting: str = "softmax",
    balance: bool = True,
    scaling: bool = True,
) -> Balance:
    """The two weights and the scaling factor of one pair."""
    if weighting == "softmax":
        least = min(mi_chosen, mi_rejected)  # takes a common factor out of the fraction
        pull_chosen = math.exp(-alpha * (mi_chosen - least))
        pull_rejected = math.exp(-alpha * (mi_rejected - least))
    elif weighting == "power":
        i_w, i_l = max(mi_chosen, 0.05), max(mi_rejected, 0.05)
        most = max(i_w, i_l)
        pull_chosen = (i_l / most) ** alpha
        pull_rejected = (i_w / most) ** alpha
    else:
        raise AssertionError(weighting)
    w_w = 2 * pull_chosen / (pull_chosen + pull_rejected)
    w_l = 2 - w_w
    s = math.sqrt(2 / (w_w**2 + w_l**2))
    if not balance:
        w_w = w_l = 1.0
    if not scaling:
        s = 1.0
    return Balance(w_w, w_l, s)


# --- section 7: loss -----------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def pair_loss(
    policy_chosen_logps: float,
    policy_rejected_logps: float,
    ref_chosen_logps: float,
    ref_rejected_logps: float,
    weights: Balance = PLAIN_DPO,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_tokens: int = 1,
    rejected_tokens: int = 1,
) -> float:
    """The loss of one pair; with the weights left out, TRL's DPO."""
    w_w, w_l, s = weights
    ratio_chosen = s * w_w * (policy_chosen_logps - ref_chosen_logps)
    ratio_rejected = s * w_l * (policy_rejected_logps - ref_rejected_logps)
    h = ratio_chosen - ratio_rejected
    if loss_type == "sigmoid":
        return -log_sigmoid(beta * h)
    if loss_type == "hinge":
        return max(0.0, 1 - beta * h)
    if loss_type == "ipo":
        per_token = ratio_chosen / chosen_tokens - ratio_rejected / rejected_tokens
        return (per_token - 1 / (2 * beta)) ** 2
    if loss_type == "robust":
        e = label_smoothing
        right, flipped = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
        return ((1 - e) * right - e * flipped) / (1 - 2 * e)
    raise AssertionError(loss_type)


def sft_loss(policy: Model, prompts: list[list[int]], chosen: list[list[int]]) -> float:
    """Mean cross-entropy over all chosen response tokens of a batch, nats per token."""
    total, tokens = 0.0, 0
    for prompt, response in zip(prompts, chosen, strict=True):
        total -= response_logps(policy, prompt, response)
        tokens += len(response)
    return total / tokens


def batch_loss(
    policy: Model,
    prompts: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    scores: list[PairScore],
    *,
    alpha: float = 1.5,
    weighting: str = "softmax",
    balance: bool = True,
    scaling: bool = True,
    beta: float = 0.1,
    loss_types: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> float:
    """The training loss of one micro-batch: the mean over its pairs, the weighted sum over losses.

    Args:
        scores: of the same pairs, from :func:`score_pair` on the reference.
        loss_types: per-pair losses, and ``sft`` where TRL's additional term is on.
        loss_weights: of the losses, 1 each where left out.
    """
    total = 0.0
    for loss_type, loss_weight in zip(
        loss_types, loss_weights or [1.0] * len(loss_types), strict=True
    ):
        if loss_type == "sft":
            total += loss_weight * sft_loss(policy, prompts, chosen)
            continue
        losses = []
        for prompt, y_w, y_l, score in zip(prompts, chosen, rejected, scores, strict=True):
            weights = balance_pair(
                score.mi_chosen,
                score.mi_rejected,
                alpha=alpha,
                weighting=weighting,
                balance=balance,
                scaling=scaling,
            )
            losses.append(
                pair_loss(
                    response_logps(policy, prompt, y_w),
                    response_logps(policy, prompt, y_l),
                    score.ref_chosen_logps,
                    score.ref_rejected_logps,
                    weights,
                    beta=beta,
                    loss_type=loss_type,
                    label_smoothing=label_smoothing,
                    chosen_tokens=len(y_w),
                    rejected_tokens=len(y_l),
                )
            )
        total += loss_weight * sum(losses) / len(losses)
    return total


def reward(
    policy: Model, prompt: list[int], response: list[int], ref_logps: float, beta: float = 0.1
) -> float:
    """The reward that is reported: plain DPO's, beta log(pi_theta / pi_ref), unweighted."""
    return beta * (response_logps(policy, prompt, response) - ref_logps)
