"""Sixty cases of soak/fuzz.py: generated data, tokenizers, templates, settings."""

import pytest

from soak.fuzz import fuzz


@pytest.mark.slow
def test_each_case_trains_on_right_scores_or_is_refused():
    tally = fuzz(60)
    assert sum(tally.outcomes.values()) >= 60
    trained = sum(n for outcome, n in tally.outcomes.items() if outcome.startswith("trained"))
    assert 5 < trained < 55
