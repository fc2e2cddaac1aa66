"""Whether the first tokens rank pairs as the whole response does: the arithmetic of it."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from studies.first_tokens import first, rank_correlation


def test_the_mean_of_the_first_tokens() -> None:
    values = np.array([4.0, 2.0, 0.0, -2.0])
    assert [first(values, n) for n in (1, 2, 100)] == [4, 3, 1]
    assert [first(values, share) for share in (0.1, 0.5, 0.75)] == [4, 3, 2]


def test_ranks() -> None:
    """Of 1, 2, 3 against 2, 1, 3: one less 6 (1 + 1 + 0) over 3 (9 - 1)."""
    one = np.array([0.1, 5.0, 70.0])
    assert rank_correlation(one, one**3) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.array([2.0, 1.0, 3.0])) == pytest.approx(0.5)
