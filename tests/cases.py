"""Which of many like cases `make test` runs, and which `make test-all` alone."""

import pytest


def first(count, cases):
    """The cases of a parametrisation, those after the first `count` marked as exhaustive."""
    cases = list(cases)
    more = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
        for case in cases[count:]
    ]
    return [*cases[:count], *more]
