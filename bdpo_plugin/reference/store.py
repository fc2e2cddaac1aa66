"""Stores computed scores on disk, under keys made from their content. The reference pass writes
them while it runs. An error of the store never ends a run."""

from __future__ import annotations

import hashlib
import os
import stat
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bdpo_plugin.reference.private_files import make_private, write_private

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logps", pa.float64()), ("gain", pa.float64())])

#: The dtype of arrays of keys: 16 bytes each.
KEY = np.dtype("S16")

#: A temporary file older than this, in seconds, was left by a killed run.
_LEFT_OVER = 3600.0

#: Part of the name of a folder whose scores do not belong to its reference; the id of the run that
#: found this out follows.
ASIDE = ".set-aside-"

_REMEDY = (
    "The run goes on: what cannot be read is computed again, and what cannot be written stays in "
    "memory, for this run alone. `bdpo_cache_dir` sets the folder of the scores."
)


def default_cache_dir() -> Path:
    """Returns the default cache directory: ``bdpo`` under the user's cache directory.

    Raises:
        RuntimeError: The user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdpo"


class Verification(NamedTuple):
    """The result of computing some reused scores again.

    Attributes:
        scores: the number of scores computed again.
        beyond: the number of them that differ by more than rounding.
        difference: the largest difference between a stored and a computed score, in nats.
    """

    scores: int = 0
    beyond: int = 0
    difference: float = 0.0


class ScoreStore:
    """The scores of one reference and tokenizer: a directory of Parquet files.

    Each file is written under a temporary name and then renamed to the hash of its content and the
    id of the run. So every file is complete, and several processes and runs may write at the same
    time. A file is removed only after its scores are in another file; a run that was about to read
    it computes its scores again.

    A file that cannot be read or written never ends a run: the error is recorded in `problems`, for
    :meth:`tell`, and the scores are computed again.

    Args:
        identity: the fingerprints that the scores depend on; None: they are unknown, and no score
            is stored.
        show: shows lines to the user; default: a Python warning.

    Attributes:
        path: the directory of these scores; None if there is none.
        run: the id of the run in the names of its files.
        problems: the problems found, by path.
        own: (n,) the keys of the scores that this run has computed itself, sorted.
        verified: the result of computing some of the reused scores again, in this run.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        identity: Iterable[str] | None,
        show: Callable[[list[str]], None] | None = None,
    ) -> None:
        self.run = uuid.uuid4().hex[:8]
        self.problems: dict[str, str] = {}
        self.own = np.zeros(0, KEY)
        self.verified = Verification()
        self._show = show or _warn
        self._told: set[str] = set()
        self.path: Path | None = None
        if identity is None:
            return
        try:
            cache = Path(directory).expanduser() if directory else default_cache_dir()
        except RuntimeError as error:
            self.problems["the scores"] = f"no folder to keep them in ({error})"
        else:
            self.path = cache / _hash("/".join(identity).encode())

    def names(self) -> list[str]:
        """Returns the names of the existing files."""
        return [file.name for file in self._list() if file.name.endswith(".parquet")]

    def read(
        self, wanted: np.ndarray, names: Iterable[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads the scores of some keys.

        Args:
            wanted: (n,) keys, sorted.

        Returns:
            (m,) indices into `wanted`, and (m, 2) their stored log-probability and information gain
            in nats, NaN if there is no gain. A score that is in several files occurs several times.
        """
        columns = self._read(sorted(self.names() if names is None else names))
        if not columns or not len(wanted):
            return np.zeros(0, np.int64), np.zeros((0, 2))
        keys, scores = (np.concatenate(column) for column in zip(*columns.values(), strict=True))
        order = np.argsort(keys)  # looking up sorted keys is several times faster
        keys, scores = keys[order], scores[order]
        places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        found = wanted[places] == keys
        return places[found], scores[found]

    def add(self, keys: np.ndarray, scores: np.ndarray) -> bool:
        """Writes more scores, atomically and durably. Scores that are not finite are not stored.

        Args:
            keys: (n,) their keys.
            scores: (n, 1) log-probabilities, or (n, 2) with the information gain; nats.

        Returns:
            Whether nothing is left to write.
        """
        finite = np.isfinite(scores).all(axis=1)
        return not finite.any() or self._write(keys[finite], scores[finite]) is not None

    def make_one_file(self) -> None:
        """Merges all existing files, including those of other runs, into one.

        The old files are removed after the new one is written. So a run that is killed in between
        leaves some scores twice, and loses none.
        """
        columns = self._read(self.names())
        if self.path is None or len(columns) < 2:
            return
        keys, scores = (np.concatenate(column) for column in zip(*columns.values(), strict=True))
        keys, first = np.unique(keys, return_index=True)
        written = self._write(keys, scores[first])
        for name in columns if written else ():
            if name != written:
                with suppress(OSError):  # a file that stays is only read once more than needed
                    (self.path / name).unlink()

    def set_aside(self, problem: str) -> None:
        """Renames the folder, so that its scores are not found again. If that fails, the scores of
        this run stay in memory only.
        """
        if self.path is None:
            return
        try:
            aside = self.path.with_name(f"{self.path.name}{ASIDE}{self.run}")
            self.path.rename(aside)
            self.problems[str(self.path)] = f"{problem}; the folder is set aside as {aside.name}"
        except FileNotFoundError:  # another rank of this run has renamed it
            pass
        except OSError as error:
            self.problems[str(self.path)] = (
                f"{problem}; the folder cannot be set aside ({_why(error)}), so that the scores of "
                "this run are not kept"
            )
            self.path = None

    def mark_as_used(self) -> None:
        """Marks the folder as in use, for :mod:`~bdpo_plugin.reference.eviction`."""
        if self.path is not None:
            with suppress(OSError, ValueError):  # it does not exist yet, or is another user's
                os.utime(self.path)

    def remove_leftovers(self) -> None:
        """Removes the temporary files that killed runs left."""
        for file in self._list():
            if file.name.startswith(".") and file.name.endswith(".tmp"):
                with suppress(OSError):  # a file that stays does no harm
                    if time.time() - file.stat().st_mtime > _LEFT_OVER:
                        file.unlink()

    def tell(self, problems: Mapping[str, str]) -> None:
        """Shows the user those of `problems` that have not been shown yet."""
        by_problem: dict[str, list[str]] = {}
        for path, problem in sorted(problems.items()):
            if path not in self._told:
                self._told.add(path)
                by_problem.setdefault(problem, []).append(path)
        if by_problem:
            self._show([*(_line(*item) for item in by_problem.items()), _REMEDY])

    def _list(self) -> list[Path]:
        if self.path is None:
            return []
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:  # nothing has been written yet
            return []
        except (OSError, ValueError) as error:
            self.problems.setdefault(str(self.path), f"cannot be read ({_why(error)})")
            return []

    def _write(self, keys: np.ndarray, scores: np.ndarray) -> str | None:
        """Writes scores to a new file; returns its name, or None if it cannot be written."""
        if self.path is None:
            return None
        content = _content(keys, scores)
        name = f"{_hash(content)}-{self.run}.parquet"
        try:
            make_private(self.path)
            write_private(self.path / name, content)
        except (OSError, ValueError) as error:  # ValueError: an invalid folder name
            self.problems.setdefault(str(self.path), f"cannot be written ({_why(error)})")
            return None
        return name

    def _read(self, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Reads the keys and scores of those of some files that can be read, by their names."""
        if self.path is None:
            return {}
        found = {name: self._columns(self.path / name) for name in names}
        return {name: columns for name, columns in found.items() if columns is not None}

    def _columns(self, file: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads (n,) keys and (n, 2) scores from a file; returns None if it cannot be read."""
        try:
            regular = stat.S_ISREG(file.stat().st_mode)  # reading a pipe would block for ever
            content = file.read_bytes() if regular else b""
        except FileNotFoundError:  # another process has merged it
            return None
        except OSError as error:
            self.problems.setdefault(str(file), f"cannot be read ({_why(error)})")
            return None
        if _hash(content) == file.name.partition(".")[0].partition("-")[0]:
            with suppress(OSError, pa.ArrowException):
                # one thread, because for columns this short more threads only wait for each other
                table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
                if table.schema.equals(_SCHEMA) and not table["key"].null_count:
                    return _arrays(table)
        self.problems.setdefault(str(file), "damaged and not used, delete it")
        return None


def _content(keys: np.ndarray, scores: np.ndarray) -> bytes:
    """Returns the content of a file with these scores."""
    key = pa.array(keys.view("V16").tolist(), pa.binary(16))
    gain = scores[:, 1] if scores.shape[1] == 2 else np.full(len(keys), np.nan)
    columns = [key, pa.array(scores[:, 0]), pa.array(gain, from_pandas=True)]  # NaN becomes null
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    pq.write_table(table, sink := pa.BufferOutputStream(), use_dictionary=False)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Converts a table to (n,) keys and (n, 2) scores, NaN for a missing gain."""
    keys = np.frombuffer(b"".join(table["key"].to_pylist()), KEY)
    return keys, np.stack([table[name].to_numpy() for name in ("logps", "gain")], axis=1)


def _warn(lines: list[str]) -> None:
    warnings.warn("\n".join(lines), stacklevel=4)


def _line(problem: str, paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return f"{paths[0]}: {problem}."
    names = ", ".join(os.path.basename(path) for path in paths[:20])
    more = f" and {len(paths) - 20} more" if len(paths) > 20 else ""
    return f"{len(paths)} files in {os.path.dirname(paths[0])}: {problem}: {names}{more}."


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
