"""Computed scores on disk: found again by content, written as they come, never a run's end."""

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

#: Of arrays of keys: 16 bytes each.
KEY = np.dtype("S16")

#: A temporary file that is older, in seconds, is one that a killed run left.
_LEFT_OVER = 3600.0

#: In the name of a folder whose scores are not those of its reference, before the run that found
#: out.
ASIDE = ".set-aside-"

#: So many files are read at a time.
_FILES = 64

_REMEDY = (
    "The run goes on: what cannot be read is computed again, and what cannot be written stays in "
    "memory, for this run alone. `bdpo_cache_dir` sets the folder of the scores."
)


def default_cache_dir() -> Path:
    """``bdpo`` under the user's cache directory.

    Raises:
        RuntimeError: the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdpo"


def framed(ids: np.ndarray | None) -> bytes:
    """What token ids, or their absence, are to :func:`score_key`; no two run into each other."""
    if ids is None:
        return b"none"
    return len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes()


def score_key(prompt: bytes, null: bytes, response: bytes) -> bytes:
    """Key of one score, 16 bytes: its token ids, and the null prompt's where it depends on it.

    Args:
        prompt, null, response: the ids, each :func:`framed`.
    """
    return hashlib.blake2b(prompt + null + response, digest_size=16).digest()


class Verification(NamedTuple):
    """What came of computing some reused scores again.

    Attributes:
        scores: how many.
        beyond: how many of them differ by more than rounding.
        difference: the greatest, between a stored and a computed one, in nats.
    """

    scores: int = 0
    beyond: int = 0
    difference: float = 0.0


class ScoreStore:
    """The scores of one reference and tokenizer: a directory of Parquet files.

    Each file is written under a temporary name and renamed to the hash of its content and the run
    that wrote it, so a file that is there is whole, and several processes and runs may write at
    once. A file goes only when what is in it is in another.

    What cannot be read or written ends no run: it is kept in `problems`, for :meth:`tell`.

    Args:
        directory: the cache directory of the user.
        identity: the fingerprints that the scores depend on; None: they are not known, and no
            score is kept.
        show: shows lines to the user; default a Python warning.

    Attributes:
        path: the directory of these scores; None where none can be had.
        run: names the run in the names of the files that it writes.
        problems: what is wrong, by the path of what it is wrong with.
        own: (n,) keys, sorted, of the scores that this run has computed itself.
        verified: what came of computing some of the reused scores again, in this run.
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
        self._gone = False
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
        """Of the files that are there."""
        return [file.name for file in self._list() if file.name.endswith(".parquet")]

    def read(
        self, wanted: np.ndarray, names: Iterable[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scores of some keys.

        A file that is damaged is set aside, under another name.

        Args:
            wanted: (n,) keys, sorted.
            names: of the files to look into; default all.

        Returns:
            (m,) places in `wanted` and (m, 2) what is stored for them in nats: log-probability and
            information gain, nan where there is none. What several files have is there as often.
        """
        places, scores = [np.zeros(0, np.int64)], [np.zeros((0, 2))]
        if self.path is None:
            return places[0], scores[0]
        left = sorted(self.names() if names is None else names)
        looked_into: set[str] = set()
        while left:
            self._gone = False
            for start in range(0, len(left), _FILES):
                columns = self._read(left[start : start + _FILES])
                if not columns or not len(wanted):
                    continue
                keys, values = (np.concatenate(column) for column in zip(*columns, strict=True))
                order = np.argsort(keys)  # to look sorted keys up is several times faster
                keys, values = keys[order], values[order]
                at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
                found = wanted[at] == keys
                places.append(at[found])
                scores.append(values[found])
            # another run may have made one file of several since their names were read
            looked_into.update(left)
            left = sorted(set(self.names()) - looked_into) if self._gone else []
        return np.concatenate(places), np.concatenate(scores)

    def add(self, keys: np.ndarray, scores: np.ndarray) -> bool:
        """Write more scores, atomically and durably. One that is not finite is not worth keeping.

        Args:
            keys: (n,).
            scores: (n, 1) log-probabilities, or (n, 2) with the information gain; nats.

        Returns:
            whether nothing is left to write.
        """
        finite = np.isfinite(scores).all(axis=1)
        return not finite.any() or self._write(keys[finite], scores[finite]) is not None

    def make_one_file(self) -> None:
        """Make one file of all that are there, of other runs too.

        The files are removed once what is in them is written, so that a run that is killed on the
        way leaves scores that are there twice, and loses none.
        """
        names = self.names()
        columns = [(name, of_file) for name in names for of_file in self._read([name])]
        if self.path is None or len(columns) < 2:
            return
        every = [of_file for _, of_file in columns]
        keys, scores = (np.concatenate(column) for column in zip(*every, strict=True))
        keys, first = np.unique(keys, return_index=True)
        written = self._write(keys, scores[first])
        for name, _ in columns if written else ():
            if name != written:
                with suppress(OSError):  # it is read once more by whoever looks for its scores
                    (self.path / name).unlink()

    def set_aside(self, problem: str) -> None:
        """Give the folder another name, so that none of its scores is found again; where that
        cannot be done, keep the scores of this run in memory."""
        if self.path is None:
            return
        try:
            aside = self.path.with_name(f"{self.path.name}{ASIDE}{self.run}")
            self.path.rename(aside)
            self.problems[str(self.path)] = f"{problem}; the folder is set aside as {aside.name}"
        except FileNotFoundError:  # by another rank of this run
            pass
        except OSError as error:
            self.problems[str(self.path)] = (
                f"{problem}; the folder cannot be set aside ({_why(error)}), so that the scores of "
                "this run are not kept"
            )
            self.path = None

    def mark_as_used(self) -> None:
        """Have it known that the folder is in use, for :mod:`~bdpo_plugin.reference.eviction`."""
        if self.path is not None:
            with suppress(OSError, ValueError):  # not there yet, or another user's
                os.utime(self.path)

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed runs left."""
        for file in self._list():
            if file.name.startswith(".") and file.name.endswith(".tmp"):
                with suppress(OSError):  # it is in nobody's way
                    if time.time() - file.stat().st_mtime > _LEFT_OVER:
                        file.unlink()

    def tell(self, problems: Mapping[str, str]) -> None:
        """Show the user, of `problems`, what has not been shown."""
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
        """The name of the file in which the scores are now; None where they cannot be written."""
        if self.path is None:
            return None
        content = _content(keys, scores)
        name = f"{_hash(content)}-{self.run}.parquet"
        try:
            make_private(self.path)
            write_private(self.path / name, content)
        except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
            self.problems.setdefault(str(self.path), f"cannot be written ({_why(error)})")
            return None
        return name

    def _read(self, names: Iterable[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What :meth:`_columns` has of some files."""
        if self.path is None:
            return []
        found = (self._columns(self.path / name) for name in names)
        return [columns for columns in found if columns is not None]

    def _columns(self, file: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """(n,) keys and (n, 2) scores of a file; None where it has none to give."""
        try:
            regular = stat.S_ISREG(file.stat().st_mode)  # reading a pipe would wait for ever
            content = file.read_bytes() if regular else b""
        except FileNotFoundError:
            if not file.is_symlink():
                self._gone = True  # by another process
                return None
            content = b""
        except OSError as error:
            self.problems.setdefault(str(file), f"cannot be read ({_why(error)})")
            return None
        if _hash(content) == file.name.partition(".")[0].partition("-")[0]:
            with suppress(OSError, pa.ArrowException):
                # one thread: for columns this short, threads only wait for each other
                table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
                table = table.combine_chunks()
                if table.schema.equals(_SCHEMA) and not table["key"].null_count:
                    return _arrays(table)
        self._set_aside(file)
        return None

    def _set_aside(self, file: Path) -> None:
        try:
            file.rename(f"{file}.damaged")
            self.problems.setdefault(str(file), "damaged and set aside as *.damaged")
        except FileNotFoundError:
            pass  # another process has set it aside, and tells of it
        except OSError as error:
            self.problems.setdefault(str(file), f"damaged, and cannot be set aside ({_why(error)})")


def _content(keys: np.ndarray, scores: np.ndarray) -> bytes:
    """Of a file that holds these scores."""
    n = len(keys)
    key = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), n, [None, pa.py_buffer(np.ascontiguousarray(keys, KEY).tobytes())]
    )
    gain = pa.nulls(n, pa.float64())
    if scores.shape[1] == 2:
        gain = pa.array(scores[:, 1], from_pandas=True)  # what is not a number is not there
    table = pa.Table.from_arrays([key, pa.array(scores[:, 0]), gain], schema=_SCHEMA)
    pq.write_table(table, sink := pa.BufferOutputStream(), use_dictionary=False)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(n,) keys and (n, 2) scores, nan where there is none."""
    if not len(table):
        return np.zeros(0, KEY), np.zeros((0, 2))
    (keys,) = table["key"].chunks
    start = keys.offset * KEY.itemsize
    keys = np.frombuffer(keys.buffers()[1], KEY, count=len(table), offset=start)
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
