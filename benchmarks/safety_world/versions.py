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
    for folder in ("model", "objective", "reference", "run", "trainer"):
        for file in sorted((root / folder).glob("*.py")):
            digest.update(file.read_bytes())
    for name in ("pairs.py", "settings.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()
