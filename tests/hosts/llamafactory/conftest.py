"""LLaMA-Factory itself on the tiny model."""

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from real_runs import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))
