"""Refusals, word by word: what is said is all that a user has."""

import re

import pytest


def refused(message: str):
    """Whoever is within must raise a ValueError that says just `message`."""
    return pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z")
