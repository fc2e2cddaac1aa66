"""Scores that the ranks of a run, and several runs at once, share through one store."""

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

#: What stands in an array of scores for one that is not there, and for one that is not finite: of
#: several ranks' arrays the maximum is what they know together.
ABSENT, NOT_FINITE = -np.inf, np.inf

#: Seconds of work that a killed run may lose, and that two runs on one store may both do.
_FLUSH_SECONDS = 2.0


class Exchange:
    """What a pass takes from a store before it begins, gives to it while it runs, and takes from
    other runs that use it.

    To be made, and asked for what all ranks have, in every rank.

    Args:
        wanted: the n scores of the pass, the same in every rank.
        scores: (n, columns), into which all that is taken is filled; :data:`ABSENT` elsewhere.
        rows: what to call the pairs in an error.
        name: of the dataset.

    Raises:
        BDPOError: the ranks want different scores.
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
        self._seen = {file for of_rank in names for file in of_rank}
        self._take(_share_of_files(names))
        scores[:] = maximum(scores, device)
        self._tell()
        self._pending: list[int] = []
        self._last = time.monotonic()

    def give(self, batch: list[int]) -> bool:
        """Have the scores of a batch written; whether it is time for that."""
        self._pending += batch
        return time.monotonic() - self._last > _FLUSH_SECONDS

    def write(self) -> None:
        """Write what is not written yet."""
        if self._store.add(self._keys[self._pending], self._scores[self._pending]):
            self._pending.clear()
        if this_rank() == 0:
            self._store.tell(self._store.problems)
        self._last = time.monotonic()

    def take(self) -> np.ndarray:
        """Fill in what other runs have computed since; the indices."""
        own = f"-{self._store.run}."
        names = {file for file in self._store.names() if own not in file} - self._seen
        self._seen |= names
        return self._take(names)

    def of_all_ranks(self, computed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The (n, columns) scores, and (n,) bool, which were computed, in any rank; the pass is at
        its end, and what is stored is put in order."""
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
        """The indices of the scores that are taken from other runs than this one."""
        own = np.isin(self._keys, self._store.own)
        return np.flatnonzero((self._scores[:, 0] != ABSENT) & ~own)

    def verified(self, found: Verification) -> None:
        """Take in what came of computing some of the reused scores again; where one is beyond
        rounding, have none of them, in any rank, and say so."""
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
        self._tell()  # once all ranks have done so, none of them has written again
        self._scores[:] = ABSENT

    def _take(self, names: Iterable[str]) -> np.ndarray:
        """Fill in the absent scores that some files have; the indices of those."""
        places, found = self._store.read(self._keys, names)
        found = found[:, : self._scores.shape[1]]
        good = np.isfinite(found).all(axis=1) & (self._scores[places, 0] == ABSENT)
        self._scores[places[good]] = found[good]
        return np.unique(places[good])

    def _tell(self) -> None:
        """The main rank tells of the problems of all."""
        problems = gathered(self._store.problems)
        if this_rank() == 0:
            self._store.tell({path: problem for of in problems for path, problem in of.items()})


def _share_of_files(names: Sequence[Sequence[str]]) -> list[str]:
    """This rank's part of the files that the ranks see: a machine may have its own folder."""
    holders: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(names):
        for file in of_rank:
            holders.setdefault(file, []).append(rank)
    return [
        file
        for i, (file, ranks) in enumerate(sorted(holders.items()))
        if ranks[i % len(ranks)] == this_rank()
    ]
