"""The code of docs/related.md and of docs/hosts.md: other methods in a few lines."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from bdpo_plugin import ChosenRejected, bdpo_loss

DOCS = Path(__file__).parents[3] / "docs"
POLICY = ChosenRejected(torch.tensor([-3.0, -5.0]), torch.tensor([-9.0, -4.0]))
REFERENCE = ChosenRejected(torch.tensor([-4.0, -4.0]), torch.tensor([-5.0, -6.0]))


def code_of(page, name):
    """What the block of a page that has a name defines."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if name in block)
    found = {}
    exec(block, found)
    return found


def of(gap):
    return -torch.nn.functional.logsigmoid(0.1 * torch.tensor(gap))


def test_dpo_shift_is_a_constant_weight_of_the_rejected_response() -> None:
    weights = code_of("related.md", "def shifted")["shifted"](torch.rand(2), torch.rand(2))
    # log-ratios: chosen 1 and -1, rejected -4 and 2
    expected = of([1 + 0.8 * 4, -1 - 0.8 * 2])
    assert torch.allclose(bdpo_loss(POLICY, REFERENCE, weights, beta=0.1), expected)


def test_bpo_trains_the_smaller_side() -> None:
    trainer = code_of("related.md", "class BPOTrainer")["BPOTrainer"]
    found = trainer.pair_loss(POLICY, REFERENCE, None, beta=0.1, loss_type="sigmoid")
    assert torch.allclose(found, of([1.0, -1.0]))


def test_safedpo_has_a_margin_where_the_label_says_so() -> None:
    made = code_of("hosts.md", "class SafeDPOTrainer")
    weights = made["margin"](torch.rand(2), torch.rand(2), label=["unsafe", "safe"])
    found = made["SafeDPOTrainer"].pair_loss(POLICY, REFERENCE, weights, beta=0.1)
    assert torch.allclose(found, of([5.0 - 20, -3.0]))
