"""Computed scores on disk: found again by content, written as they come."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bdpo_plugin.settings import BDPOError

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logps", pa.float64()), ("gain", pa.float64())])


class Score(NamedTuple):
    """Of one response after one prompt under the reference, in nats.

    Attributes:
        logps: log pi_ref(y | x), summed over the response tokens.
        gain: summed KL to the distribution after the null prompt; None where not wanted.
    """

    logps: float
    gain: float | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.logps) and (self.gain is None or math.isfinite(self.gain))


def default_cache_dir() -> Path:
    """``bdpo`` under the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdpo"


def score_key(prompt: np.ndarray, null: np.ndarray | None, response: np.ndarray) -> bytes:
    """Key of one score: its token ids, and the null prompt's where the score depends on it."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, null, response):
        if ids is None:
            digest.update(b"none")
        else:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.digest()


class ScoreStore:
    """The scores of one reference and tokenizer: a directory of Parquet files.

    Each file is written under a temporary name and renamed to the hash of its content, so a file
    that is there is whole; files are only ever added, so that several processes and runs may
    write at once.

    Args:
        directory: the cache directory of the user.
        identity: the fingerprints that the scores depend on.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, identity: Iterable[str]) -> None:
        cache = Path(directory).expanduser() if directory else default_cache_dir()
        self.path = cache / _hash("/".join(identity).encode())

    def read(self) -> dict[bytes, Score]:
        """All scores that are stored."""
        scores: dict[bytes, Score] = {}
        for file in sorted(self.path.glob("*.parquet")):
            content = file.read_bytes()
            if _hash(content) != file.stem:
                raise BDPOError(
                    f"The score file {file} is damaged: its content is not what was written. "
                    "Delete it: its scores, and only these, are computed again."
                )
            columns = pq.read_table(pa.BufferReader(content)).to_pydict()
            rows = zip(columns["key"], columns["logps"], columns["gain"], strict=True)
            scores.update((key, Score(logps, gain)) for key, logps, gain in rows)
        return scores

    def add(self, scores: Mapping[bytes, Score]) -> None:
        """Write more scores, atomically. One that is not finite is not worth keeping."""
        scores = {key: score for key, score in scores.items() if score.finite}
        if not scores:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {
                "key": list(scores),
                "logps": [s.logps for s in scores.values()],
                "gain": [s.gain for s in scores.values()],
            },
            schema=_SCHEMA,
        )
        pq.write_table(table, sink := pa.BufferOutputStream())
        content = sink.getvalue().to_pybytes()
        temporary = self.path / f".{uuid.uuid4().hex}.tmp"
        temporary.write_bytes(content)
        temporary.replace(self.path / f"{_hash(content)}.parquet")


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
