"""A whole preference dataset -> its scores, computed once and shared by all ranks."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import is_sharded
from bdpo_plugin.objective import mutual_information
from bdpo_plugin.pairs import Pair
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.ranks import (
    gathered,
    maximum,
    raised_by_all,
    share,
    this_rank,
    world_size,
)
from bdpo_plugin.reference.reference import Reference
from bdpo_plugin.reference.scoring import Score, budgeted_batches, score_jobs
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.reference.wanted import Wanted, difference, wanted_scores
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.visible import visible

#: Seconds of work that a killed run may lose, and that two runs on one store may both do.
_FLUSH_SECONDS = 2.0

#: What stands in an array of scores for one that is not there, and for one that is not finite: of
#: several ranks' arrays the maximum is what they know together.
_ABSENT, _NOT_FINITE = -np.inf, np.inf


class PairScores(NamedTuple):
    """The reference's view of B pairs; all (B,), the first six float32 or int64 on the CPU.

    Attributes:
        ref_chosen_logps, ref_rejected_logps: log pi_ref(y|x), nats, summed.
        mi_chosen, mi_rejected: I(x; y), nats per token, or nats if not normalised.
        chosen_tokens, rejected_tokens: |y|.
        computed: (B,) bool, whether a score of the pair was computed in this call.
    """

    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    mi_chosen: Tensor
    mi_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    computed: Tensor


def score_pairs(
    pairs: Sequence[Pair],
    reference: Reference,
    null_prompt: NullPrompt,
    settings: BDPOSettings,
    *,
    reader: ResponseReader,
    device: torch.device,
    store: ScoreStore | None = None,
    name: str = "",
    rows: Sequence[int] | None = None,
) -> PairScores:
    """The log-probabilities and mutual information of all pairs under the reference.

    With a `store`, what it holds is not computed again, what is computed goes to it while the
    pass runs, and the ranks of a distributed run share the work, as do several runs that use one
    store at once. Without, every rank scores its own pairs.

    Args:
        pairs: B preference pairs, after truncation; the same in every rank if there is a store.
        name: of the dataset, on the progress bar.
        rows: what to call the pairs in an error; default their position.

    Raises:
        BDPOError: a score that is missing or not finite, with the rows; pairs that differ between
            the ranks.
    """
    wanted = wanted_scores(pairs, null_prompt, with_gain=settings.mi_estimator == "expected")
    rows = range(len(pairs)) if rows is None else rows
    scores = np.full((len(wanted.jobs), wanted.columns), _ABSENT)
    seen: set[str] = set()
    if store:
        seen = _read_stored(store, wanted, scores, rows, name)
        scores = maximum(scores, device)
        _tell(store)
    missing = np.flatnonzero(scores[:, 0] == _ABSENT)
    computed = np.zeros(len(scores), dtype=bool)
    if len(missing):
        scores, computed = _compute(
            wanted,
            scores,
            missing[np.argsort(wanted.first[missing])],
            reference,
            settings.score_tokens,
            reader=reader,
            device=device,
            store=store,
            seen=seen,
            name=name,
        )
    _check_coverage(scores[wanted.of_pair], rows)

    of_pair = torch.from_numpy(scores[wanted.of_pair]).float()  # (B, scores, columns)
    of_side = of_pair.unflatten(1, (2, -1)).movedim(0, -1).contiguous()  # (2, scores, columns, B)
    logps = of_side[:, 0, 0]
    lengths = torch.tensor([len(side.response) for pair in pairs for side in pair])
    lengths = lengths.reshape(-1, 2).T.contiguous()
    normalize = settings.mi_normalize
    if settings.mi_estimator == "expected":
        mi = of_side[:, 0, 1] / lengths if normalize else of_side[:, 0, 1]
    else:
        sides = zip(logps, of_side[:, 1, 0], lengths, strict=True)
        mi = [mutual_information(*side, normalize=normalize) for side in sides]
    now = torch.from_numpy(computed[wanted.of_pair].any(axis=1))
    return PairScores(*logps, *mi, *lengths, now)


def _read_stored(
    store: ScoreStore, wanted: Wanted, scores: np.ndarray, rows: Sequence[int], name: str
) -> set[str]:
    """Fill in what this rank's part of the store holds; the names of all its files.

    Raises:
        BDPOError: the ranks want different scores.
    """
    store.remove_leftovers()
    of_rows = wanted.keys[wanted.of_pair]
    digest = hashlib.blake2b(of_rows.tobytes()).digest()
    digests, runs, names = zip(*gathered((digest, store.run, store.names())), strict=True)
    if len(set(digests)) > 1:
        raise BDPOError(difference(gathered((of_rows, list(rows))), name))
    store.run = runs[0]
    holders: dict[str, list[int]] = {}  # the ranks that see it: a machine may have its own folder
    for rank, of_rank in enumerate(names):
        for file in of_rank:
            holders.setdefault(file, []).append(rank)
    mine = [
        file
        for i, (file, ranks) in enumerate(sorted(holders.items()))
        if ranks[i % len(ranks)] == this_rank()
    ]
    _take(store, wanted.keys, mine, scores)
    return set(holders)


def _take(
    store: ScoreStore, keys: np.ndarray, names: Iterable[str], scores: np.ndarray
) -> np.ndarray:
    """Fill in the absent scores that some files have; the indices of those."""
    places, found = store.read(keys, names)
    found = found[:, : scores.shape[1]]
    good = np.isfinite(found).all(axis=1) & (scores[places, 0] == _ABSENT)
    scores[places[good]] = found[good]
    return np.unique(places[good])


def _tell(store: ScoreStore) -> None:
    """The main rank tells of the problems of all; each is to call it."""
    problems = gathered(store.problems)
    if this_rank() == 0:
        store.tell({path: problem for of in problems for path, problem in of.items()})


def _compute(
    wanted: Wanted,
    scores: np.ndarray,
    missing: np.ndarray,
    reference: Reference,
    token_budget: int,
    *,
    reader: ResponseReader,
    device: torch.device,
    store: ScoreStore | None,
    seen: set[str],
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill in the `missing` scores, in all ranks where there is a store.

    Returns:
        (n, columns) scores, and (n,) bool, whether it was computed here.
    """
    jobs = wanted.jobs
    batches = [
        missing[batch].tolist()
        for batch in budgeted_batches([jobs[i] for i in missing], token_budget)
    ]
    tokens = np.zeros(len(jobs), dtype=np.int64)
    tokens[missing] = [jobs[i].rows * jobs[i].length for i in missing]
    in_step = world_size() > 1 and is_sharded(reference.model)
    if in_step:
        batches = _in_step(batches, same=store is not None, device=device)
    elif store:
        batches = share(batches, tokens)
        rest = batches[1:]  # the longest stays first: what does not fit in memory is seen early
        random.Random().shuffle(rest)  # another run on the store is to begin elsewhere
        batches[1:] = rest
    mine = np.zeros(len(jobs), dtype=bool)
    mine[[i for batch in batches for i in batch]] = True
    computed = np.zeros(len(jobs), dtype=bool)
    pending: list[int] = []
    flushed = time.monotonic()
    progress = tqdm(
        total=sum(int(tokens[batch].sum()) for batch in batches),
        desc=f"Scoring the {visible(name)} data with the reference model",
        unit="tok",
        unit_scale=True,
        disable=store is None or this_rank() != 0,
    )

    def absent(batch: list[int]) -> list[int]:
        return [i for i in batch if scores[i, 0] == _ABSENT]

    def write() -> None:
        if store.add(wanted.keys[pending], scores[pending]):
            pending.clear()
        if this_rank() == 0:
            store.tell(store.problems)

    def take_from_other_runs() -> None:
        names = {file for file in store.names() if f"-{store.run}." not in file} - seen
        seen.update(names)
        taken = _take(store, wanted.keys, names, scores)
        progress.update(int(tokens[taken[mine[taken]]].sum()))

    apart = store is not None and not in_step  # the ranks need not run the same
    try:
        with progress, reference.in_force() as model:
            found = score_jobs(
                model,
                reader,
                jobs,
                batches,
                device,
                in_step=in_step,
                left=absent if apart else list,
            )
            for batch, batch_scores in raised_by_all(found) if apart else found:
                scores[batch] = _array(batch_scores, wanted.columns)
                computed[batch] = True
                pending += batch
                progress.update(int(tokens[batch].sum()))
                if store and time.monotonic() - flushed > _FLUSH_SECONDS:
                    write()
                    if apart:
                        take_from_other_runs()
                    flushed = time.monotonic()
    finally:
        if store:
            write()
    if not store:
        return scores, computed
    shared = maximum(np.column_stack([scores, computed]), device)
    _tell(store)
    return shared[:, :-1], shared[:, -1] > 0


def _in_step(batches: list[list[int]], *, same: bool, device: torch.device) -> list[list[int]]:
    """As many batches in each rank, the last repeated: a share of the `same`, or its own."""
    if same:
        batches = batches + [batches[-1]] * (-len(batches) % world_size())
        return batches[this_rank() :: world_size()]
    most = torch.tensor(len(batches), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [batches[-1]] * (int(most) - len(batches))


def _array(scores: list[Score], columns: int) -> np.ndarray:
    """(n, columns) scores."""
    values = np.array(scores, dtype=np.float64)[:, :columns]
    return np.where(np.isfinite(values), values, _NOT_FINITE)


def _check_coverage(scores: np.ndarray, rows: Sequence[int]) -> None:
    """Of (B, k, columns) scores, whether each is there and finite."""
    for problem, bad in (
        ("has no score", scores == _ABSENT),
        ("has a score that is not finite", ~np.isfinite(scores)),
    ):
        found = np.flatnonzero(bad.any(axis=(1, 2))).tolist()
        if found:
            first = ", ".join(str(rows[i]) for i in found[:10])
            raise BDPOError(
                f"{len(found)} of {len(scores)} pairs: the reference model {problem} for them. "
                f"First rows: {first}. If the model runs in float16, "
                "load it in bfloat16 or float32; otherwise look at these rows."
            )
