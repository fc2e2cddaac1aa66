"""The package's code, by content: results and scores of another state of it are others."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import bdpo_plugin


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Of every Python file of the package that a run imports."""
    root = Path(bdpo_plugin.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("data", "hosts/trl", "model", "objective", "output", "reference", "training"):
        for file in sorted((root / folder).glob("*.py")):
            digest.update(file.read_bytes())
    digest.update((root / "settings.py").read_bytes())
    return digest.hexdigest()
