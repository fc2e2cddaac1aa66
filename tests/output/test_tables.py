"""What a run prints, and what is left of it where the user wants to see errors only."""

import pytest
import torch
import transformers

from bdpo_plugin.objective import balance_weights
from bdpo_plugin.output.tables import print_problems, print_scores, print_settings
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOSettings


@pytest.fixture(params=["warning", "error"])
def level(request):
    before = transformers.logging.get_verbosity()
    getattr(transformers.logging, f"set_verbosity_{request.param}")()
    yield request.param
    transformers.logging.set_verbosity(before)


def test_warnings_and_problems_are_printed_at_every_log_level(level, capsys) -> None:
    null = NullPrompt((1,), "x", "the key", warnings=("the null prompt is long",))
    settings = BDPOSettings(control="shuffled")
    print_settings(settings, "adapter off", null, warnings=["padding changes the logits"])
    two = torch.ones(2)
    scores = PairScores(two, two, two, two, two.long(), two.long(), two.bool())
    print_scores("train", settings, scores, balance_weights(two, two))
    print_problems(["3 of 8 pairs are empty (dropped)"])
    out = " ".join(capsys.readouterr().out.split())
    for words in ("null prompt is long", "padding changes", "3 of 8 pairs", "not B-DPO but its"):
        assert words in out
    assert ("adapter off" in out) == (level == "warning")
    assert ("weight chosen" in out) == (level == "warning")
