"""The loss and the metrics of a batch, beside the same by plain tensor arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.score_columns import SCORE_COLUMNS
from bdpo_plugin.training.step import TOTAL, LossTerms, MetricSums, preference_step

#: Reference log-probabilities, mutual information, weights and scale of two pairs.
SCORES = torch.tensor(
    [[-20.0, -30.0], [-25.0, -28.0], [0.5, -0.1], [0.2, 0.3], [0.6, 1.2], [1.4, 0.8], [0.9, 0.95]]
)
BETA = 0.1


@pytest.fixture(scope="module")
def case():
    """A model, and a batch of two pairs: their tokens, attention mask and trained tokens."""
    tokenizer = build_tokenizer()
    ids = torch.randint(5, len(tokenizer), (4, 12), generator=torch.Generator().manual_seed(0))
    mask, trained = torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
    trained[:, :4] = False
    for row, length in enumerate((12, 9, 10, 7)):
        mask[row, length:], trained[row, length:] = 0, False
    return small_model(tokenizer).eval(), ids, mask, trained


def run(case, *types):
    model, ids, mask, trained = case
    batch = PreferenceBatch.of(
        {"input_ids": ids, "attention_mask": mask, "labels": ids}, trained, without=["labels"]
    )
    terms = LossTerms(types, [1.0] * len(types), BETA)
    scores = dict(zip(SCORE_COLUMNS, SCORES, strict=True))
    return preference_step(ResponseReader(), model, batch, scores, terms)


def by_hand(case):
    """(4,) the log-probability and the number of trained tokens of each sequence."""
    model, ids, mask, trained = case
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    each = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * trained[:, 1:]
    return each.sum(dim=1), trained[:, 1:].sum(dim=1)


def test_the_loss_of_each_term(case):
    logps, lengths = by_hand(case)
    won, lost, _, _, weight_won, weight_lost, scale = SCORES
    advantage = scale * (weight_won * (logps[:2] - won) - weight_lost * (logps[2:] - lost))
    wanted = {
        "sigmoid": -F.logsigmoid(BETA * advantage).mean(),
        "sft": -logps[:2].sum() / lengths[:2].sum(),
        "sft_by_pair": -(logps[:2] / lengths[:2]).mean(),
    }
    for kind, loss in wanted.items():
        torch.testing.assert_close(run(case, kind)[0].detach(), loss, rtol=1e-5, atol=1e-5)
    both = run(case, "sigmoid", "sft")[0].detach()
    torch.testing.assert_close(both, wanted["sigmoid"] + wanted["sft"], rtol=1e-5, atol=1e-5)


def test_rewards_are_those_of_dpo_without_weights(case):
    logps, _ = by_hand(case)
    found = {
        name: (total / count).item() for name, (total, count) in run(case, "sigmoid")[1].items()
    }
    rewards = BETA * (logps - SCORES[:2].flatten())
    assert found["rewards/chosen"] == pytest.approx(rewards[:2].mean().item(), abs=1e-5)
    assert found["rewards/rejected"] == pytest.approx(rewards[2:].mean().item(), abs=1e-5)
    assert found["logps/chosen"] == pytest.approx(logps[:2].mean().item(), rel=1e-5)
    assert found["bdpo/imbalance"] == pytest.approx(0.35)
    assert found["bdpo/chosen_share"] == 0.5
    assert found["bdpo/weight_rejected"] == pytest.approx(1.1)
    assert found[TOTAL] == case[2].sum()


def test_metrics_are_means_over_the_counts_of_all_ranks():
    sums = MetricSums(reduce=lambda tensor: 2 * tensor)  # as of two like ranks
    one, none = torch.tensor(1.0), torch.tensor(0.0)
    sums.add(
        {
            "mean": (torch.tensor(6.0), torch.tensor(4.0)),
            "none": (none, none),
            TOTAL: (5 * one, one),
        }
    )
    sums.add({"mean": (one, one), "none": (one, one), TOTAL: (one, one)})
    assert sums.drain() == [{"mean": 1.5, TOTAL: 10}, {"mean": 1, "none": 1, TOTAL: 2}]
    assert sums.drain() == []
