"""Section 7 of the method and its properties 1, 2 and 4, with real gradients."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
import truth
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor

from bdpo_plugin.objective import BalanceWeights, ChosenRejected, balance_weights, bdpo_loss
from bdpo_plugin.settings import PAIR_LOSSES

WEIGHTINGS = ["softmax", "power"]
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
PAIRS, PARAMETERS = 6, 9
BETA, SMOOTHING = 0.3, 0.2


def dpo_loss(loss_type: str, chosen: Tensor, rejected: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
    """DPO as its authors and TRL write it, from the two log-ratios and the lengths."""
    logits = BETA * (chosen - rejected)
    if loss_type == "sigmoid":
        return -F.logsigmoid(logits)
    if loss_type == "hinge":
        return torch.relu(1 - logits)
    if loss_type == "ipo":
        return (chosen / n_w - rejected / n_l - 1 / (2 * BETA)) ** 2
    right, flipped = F.logsigmoid(logits), F.logsigmoid(-logits)
    return (-(1 - SMOOTHING) * right + SMOOTHING * flipped) / (1 - 2 * SMOOTHING)


class Batch:
    """Random pairs under a log-linear policy: log pi(y) = features(y) . theta."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=dtype)

        self.theta = randn(PARAMETERS).requires_grad_()
        self.features = 3 * randn(PAIRS, PARAMETERS), 3 * randn(PAIRS, PARAMETERS)
        self.ref = ChosenRejected(5 * randn(PAIRS), 5 * randn(PAIRS))
        self.mi = randn(PAIRS), randn(PAIRS)
        self.lengths = ChosenRejected(
            torch.randint(1, 40, (PAIRS,), generator=rng),
            torch.randint(1, 40, (PAIRS,), generator=rng),
        )

    def logps(self) -> ChosenRejected:
        return ChosenRejected(self.features[0] @ self.theta, self.features[1] @ self.theta)

    def bdpo(self, weights: BalanceWeights, loss_type: str) -> Tensor:
        return bdpo_loss(
            self.logps(),
            self.ref,
            weights,
            beta=BETA,
            loss_type=loss_type,
            label_smoothing=SMOOTHING,
            lengths=self.lengths,
        )

    def dpo(self, loss_type: str) -> Tensor:
        chosen, rejected = self.logps()
        return dpo_loss(loss_type, chosen - self.ref[0], rejected - self.ref[1], *self.lengths)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), self.theta)[0]


seeds = st.integers(0, 2**31)
losses = pytest.mark.parametrize("loss_type", PAIR_LOSSES)
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)


def test_signature() -> None:
    parameters = inspect.signature(bdpo_loss).parameters
    assert list(parameters)[:3] == ["policy", "reference", "weights"]
    keyword_only = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == {
        "beta": 0.1,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "lengths": None,
    }


def test_by_hand() -> None:
    """Log-ratios 2 and -1, weights 0.5 and 1.5, scale 0.8: r_w = 0.8, r_l = -1.2, h = 2, beta 0.5.

    sigmoid: log(1 + e^-1) = 0.313262;  hinge: max(0, 1 - 1) = 0;
    ipo, lengths 2 and 4: (0.4 + 0.3 - 1)^2 = 0.09;
    robust, e = 0.1: (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8 = 0.188262.
    """
    weights = BalanceWeights(torch.tensor([0.5]), torch.tensor([1.5]), torch.tensor([0.8]))
    policy, reference, lengths = (
        ChosenRejected(*(torch.tensor([x]) for x in of_model))
        for of_model in ((-3.0, -6.0), (-5.0, -5.0), (2, 4))
    )
    expected = {"sigmoid": 0.313262, "hinge": 0, "ipo": 0.09, "robust": 0.188262}
    for loss_type, value in expected.items():
        ours = bdpo_loss(
            policy,
            reference,
            weights,
            beta=0.5,
            loss_type=loss_type,
            label_smoothing=0.1,
            lengths=lengths,
        )
        assert ours.tolist() == pytest.approx([value], abs=1e-6), loss_type


@losses
@weightings
@given(seed=seeds, off=st.sampled_from(["alpha", "switches"]))
def test_off_is_dpo(loss_type, weighting, seed, off) -> None:
    """Property 1: the loss and the gradient are those of DPO, to the last bit."""
    batch = Batch(seed)
    options = {"alpha": 0} if off == "alpha" else {"balance": False, "scaling": False}
    ours = batch.bdpo(balance_weights(*batch.mi, weighting=weighting, **options), loss_type)
    theirs = batch.dpo(loss_type)
    assert torch.equal(ours, theirs)
    assert torch.equal(batch.gradient(ours), batch.gradient(theirs))


@losses
@weightings
@given(seed=seeds, alpha=st.floats(0, 1e3))
def test_balanced_pairs_are_dpo(loss_type, weighting, seed, alpha) -> None:
    """Property 2, whatever the other pairs of the batch are."""
    batch = Batch(seed)
    mi_rejected = torch.where(torch.arange(PAIRS) % 2 == 0, batch.mi[0], batch.mi[1])
    weights = balance_weights(batch.mi[0], mi_rejected, alpha=alpha, weighting=weighting)
    assert torch.equal(batch.bdpo(weights, loss_type)[::2], batch.dpo(loss_type)[::2])


@weightings
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])
@given(alpha=st.floats(0, 1e3), i_w=st.floats(-5, 5), i_l=st.floats(-5, 5), seed=st.integers(0, 99))
def test_gradient_norm_is_dpos(loss_type, weighting, alpha, i_w, i_l, seed) -> None:
    """Property 4: for orthonormal g_w, g_l the gradient is as long as DPO's for every alpha.

    At theta = reference, where both losses have the same slope in h.
    """
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(PARAMETERS, 2, dtype=torch.float64)).Q
    theta = torch.randn(PARAMETERS, dtype=torch.float64, requires_grad=True)
    logps = ChosenRejected(*((basis[:, side] @ theta).reshape(1) for side in (0, 1)))
    mi = [torch.tensor([x], dtype=torch.float64) for x in (i_w, i_l)]

    def gradient(weights: BalanceWeights) -> Tensor:
        reference = ChosenRejected(*(x.detach() for x in logps))
        loss = bdpo_loss(logps, reference, weights, loss_type=loss_type)
        return torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0]

    weights = balance_weights(*mi, alpha=alpha, weighting=weighting)
    plain, ours = gradient(balance_weights(*mi, alpha=0)), gradient(weights)
    assert ours.norm().item() == pytest.approx(plain.norm().item(), rel=1e-9)
    # each response is pulled as DPO pulls it, times its weight and the scale
    pulls, plain_pulls = (basis.T @ ours).tolist(), (basis.T @ plain).tolist()
    by_weight = [w.item() * weights.scale.item() for w in (weights.chosen, weights.rejected)]
    for pull, plain_pull, factor in zip(pulls, plain_pulls, by_weight, strict=True):
        assert pull == pytest.approx(factor * plain_pull, rel=1e-9, abs=1e-12)


def test_without_scaling_imbalance_pulls_hardest() -> None:
    """Section 6: at weights (0, 2) "BW only" is sqrt(2) times DPO's gradient, what s takes back."""
    logps = ChosenRejected(*(torch.zeros(1, requires_grad=True) for _ in range(2)))
    zero = torch.zeros(1)
    norms = []
    for options in ({"alpha": 0}, {"alpha": 1e3, "scaling": False}, {"alpha": 1e3}):
        weights = balance_weights(torch.ones(1), zero, **options)
        loss = bdpo_loss(logps, ChosenRejected(zero, zero), weights).sum()
        norms.append(torch.cat(torch.autograd.grad(loss, logps)).norm().item())
    assert norms[1] / norms[0] == pytest.approx(math.sqrt(2))
    assert norms[2] / norms[0] == pytest.approx(1)


@losses
@weightings
@pytest.mark.parametrize(("balance", "scaling"), SWITCHES)
@given(seed=seeds, alpha=st.floats(0, 5))
def test_agrees_with_truth(loss_type, weighting, balance, scaling, seed, alpha) -> None:
    batch = Batch(seed, torch.float64)
    options = {
        "alpha": alpha, "weighting": weighting, "balance": balance, "scaling": scaling
    }  # fmt: skip
    ours = batch.bdpo(balance_weights(*batch.mi, **options), loss_type).tolist()
    columns = [t.tolist() for t in (*batch.logps(), *batch.ref, *batch.mi, *batch.lengths)]
    for i, (p_w, p_l, r_w, r_l, i_w, i_l, n_w, n_l) in enumerate(zip(*columns, strict=True)):
        expected = truth.pair_loss(
            *(p_w, p_l, r_w, r_l),
            truth.balance_pair(i_w, i_l, **options),
            beta=BETA,
            loss_type=loss_type,
            label_smoothing=SMOOTHING,
            chosen_tokens=n_w,
            rejected_tokens=n_l,
        )
        assert ours[i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_four_ablations_are_four_losses() -> None:
    batch = Batch(0)
    means = {
        batch.bdpo(balance_weights(*batch.mi, balance=b, scaling=s), "sigmoid").mean().item()
        for b, s in SWITCHES
    }
    assert len(means) == 4


@losses
def test_only_the_policy_is_trained(loss_type) -> None:
    batch = Batch(0)
    constants = [torch.randn(PAIRS, requires_grad=True) for _ in range(5)]
    reference, weights = ChosenRejected(*constants[:2]), BalanceWeights(*constants[2:])
    loss = bdpo_loss(batch.logps(), reference, weights, loss_type=loss_type)
    loss.mean().backward()
    assert batch.theta.grad is not None
    assert all(constant.grad is None for constant in constants)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(loss_type, dtype) -> None:
    extremes = torch.tensor([-1e4, -1, 0, 1, 1e4], dtype=dtype)
    policy = ChosenRejected(
        extremes.repeat_interleave(5).requires_grad_(),
        extremes.repeat(5).requires_grad_(),
    )
    ref = ChosenRejected(*[torch.zeros(25, dtype=dtype)] * 2)
    mi = torch.linspace(-1e3, 1e3, 25)
    weights = balance_weights(mi, -mi, alpha=1e3)
    loss = bdpo_loss(policy, ref, weights, loss_type=loss_type, label_smoothing=0.1)
    loss.mean().backward()
    assert loss.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy)


def test_pairs_do_not_see_each_other() -> None:
    batch = Batch(0)
    weights = balance_weights(*batch.mi)
    whole = bdpo_loss(batch.logps(), batch.ref, weights)
    order = torch.arange(PAIRS - 1, -1, -1)
    shuffled = bdpo_loss(
        ChosenRejected(*(p[order] for p in batch.logps())),
        ChosenRejected(*(r[order] for r in batch.ref)),
        BalanceWeights(*(w[order] for w in weights)),
    )
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=0)


def test_ipo_without_lengths_takes_averages() -> None:
    batch = Batch(0, torch.float64)
    weights = balance_weights(*batch.mi)
    averages = (
        ChosenRejected(*(x / n for x, n in zip(of_model, batch.lengths, strict=True)))
        for of_model in (batch.logps(), batch.ref)
    )
    ours = bdpo_loss(*averages, weights, beta=BETA, loss_type="ipo")
    torch.testing.assert_close(ours, batch.bdpo(weights, "ipo"))


def test_refusals() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    pair, weights = ChosenRejected(two, two), BalanceWeights(two, two, two)
    names = ["policy.chosen", "policy.rejected", "reference.chosen", "reference.rejected"]
    names += ["weights.chosen", "weights.rejected", "weights.scale"]
    for position, name in enumerate(names):
        tensors = [two] * position + [three] + [two] * (len(names) - 1 - position)
        shapes = dict.fromkeys(names, (2,)) | {name: (3,)}
        with refused(f"every tensor must be (B,), got {shapes}"):
            bdpo_loss(
                ChosenRejected(*tensors[:2]),
                ChosenRejected(*tensors[2:4]),
                BalanceWeights(*tensors[4:]),
            )
    square = two[:, None]
    with refused(f"every tensor must be (B,), got {dict.fromkeys(names, (2, 1))}"):
        bdpo_loss(*[ChosenRejected(square, square)] * 2, BalanceWeights(*[square] * 3))
    shapes = dict.fromkeys(names, (2,)) | {"lengths.chosen": (2,), "lengths.rejected": (2, 1)}
    with refused(f"every tensor must be (B,), got {shapes}"):
        bdpo_loss(pair, pair, weights, lengths=ChosenRejected(two, square))
    with refused(f"unknown loss type 'kto', must be one of {PAIR_LOSSES}"):
        bdpo_loss(pair, pair, weights, loss_type="kto")
    for smoothing in (-0.1, 0.5, math.nan):
        with refused(f"label_smoothing must be in [0, 0.5) for robust, got {smoothing!r}"):
            bdpo_loss(pair, pair, weights, loss_type="robust", label_smoothing=smoothing)
