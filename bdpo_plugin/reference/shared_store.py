"""Reads and writes the scores of a reference pass, which the ranks of a run share, in its store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bdpo_plugin.reference.distributed import first_on_machine, gathered, maximum, this_rank
from bdpo_plugin.reference.eviction import evict
from bdpo_plugin.reference.required_scores import RequiredScores, difference
from bdpo_plugin.reference.store import ScoreStore, Verification
from bdpo_plugin.settings import BDPOError

#: The values in an array of scores for a missing score and for one that is not finite. They are
#: chosen so that the maximum over the arrays of all ranks combines the scores of the ranks.
ABSENT, NOT_FINITE = -np.inf, np.inf

#: The time between two writes to the store, in seconds: the most work that a killed run loses.
_FLUSH_SECONDS = 2.0


class Exchange:
    """Exchanges scores between the reference pass and a store: reads stored scores before the
    reference pass, and writes new scores while it runs.

    The constructor, :meth:`of_all_ranks` and :meth:`verified` communicate between the ranks, so
    every rank must call them.

    Args:
        required: the n scores of the reference pass, the same in every rank.
        scores: (n, columns) array that receives the scores, in place; :data:`ABSENT` where a score
            is missing.

    Raises:
        BDPOError: The ranks require different scores.
    """

    def __init__(
        self,
        store: ScoreStore,
        required: RequiredScores,
        scores: np.ndarray,
        *,
        rows: Sequence[int],
        name: str,
        device: torch.device,
    ) -> None:
        self._store, self._keys, self._scores, self._device = store, required.keys, scores, device
        store.remove_leftovers()
        store.mark_as_used()
        of_rows = required.keys[required.of_pair]
        digest = hashlib.blake2b(of_rows.tobytes()).digest()
        digests, runs, names = zip(*gathered((digest, store.run, store.names())), strict=True)
        if len(set(digests)) > 1:
            raise BDPOError(difference(gathered((of_rows, list(rows))), name))
        store.run = runs[0]
        self._take(_share_of_files(names))
        scores[:] = maximum(scores, device)
        self._tell()
        self._pending: list[int] = []
        self._last = time.monotonic()

    def give(self, batch: list[int]) -> None:
        """Marks the scores of a batch to be written, and writes what is marked from time to
        time."""
        self._pending += batch
        if time.monotonic() - self._last > _FLUSH_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes the scores that are not written yet."""
        if self._store.add(self._keys[self._pending], self._scores[self._pending]):
            self._pending.clear()
        if this_rank() == 0:
            self._store.tell(self._store.problems)
        self._last = time.monotonic()

    def of_all_ranks(self, computed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Combines the scores of all ranks at the end of the reference pass, merges the files of
        the store and removes old scores from the cache.

        Args:
            computed: (n,) bool, which scores this rank has computed.

        Returns:
            (n, columns) scores, and (n,) bool, which of them any rank has computed.
        """
        shared = maximum(np.column_stack([self._scores, computed]), self._device)
        done = shared[:, -1] > 0
        store = self._store
        store.own = np.union1d(store.own, self._keys[done])
        if first_on_machine():
            store.make_one_file()
            if store.path is not None:
                evict(store.path.parent, keep=store.path)
        self._tell()
        return shared[:, :-1], done

    def earlier(self) -> np.ndarray:
        """Returns the indices of the scores that other runs have computed."""
        own = np.isin(self._keys, self._store.own)
        return np.flatnonzero((self._scores[:, 0] != ABSENT) & ~own)

    def verified(self, found: Verification) -> None:
        """Records the verification of reused scores. If one differs by more than rounding, discards
        all stored scores in every rank, and warns the user.
        """
        before = self._store.verified
        greatest = max(before.difference, found.difference)
        self._store.verified = Verification(
            before.scores + found.scores, before.beyond + found.beyond, greatest
        )
        if not found.beyond:
            return
        self._store.set_aside(
            f"of {found.scores} stored scores that were computed again {found.beyond} differ by "
            f"more than rounding, up to {found.difference:.3g} nats: another model's, or computed "
            "in another way. All scores are computed anew"
        )
        self._tell()  # synchronises the ranks, so none writes before all have set the scores aside
        self._scores[:] = ABSENT

    def _take(self, names: Iterable[str]) -> None:
        """Fills in the missing scores from some files."""
        places, found = self._store.read(self._keys, names)
        found = found[:, : self._scores.shape[1]]
        good = np.isfinite(found).all(axis=1) & (self._scores[places, 0] == ABSENT)
        self._scores[places[good]] = found[good]

    def _tell(self) -> None:
        """Gathers the problems of all ranks; the main rank shows them to the user."""
        problems = gathered(self._store.problems)
        if this_rank() == 0:
            self._store.tell({path: problem for of in problems for path, problem in of.items()})


def _share_of_files(names: Sequence[Sequence[str]]) -> list[str]:
    """Returns this rank's part of the files that the ranks see. Ranks on different machines may see
    different folders, so each file goes to a rank that sees it."""
    holders: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(names):
        for file in of_rank:
            holders.setdefault(file, []).append(rank)
    return [
        file
        for i, (file, ranks) in enumerate(sorted(holders.items()))
        if ranks[i % len(ranks)] == this_rank()
    ]
