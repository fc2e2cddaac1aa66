"""Computes the scores of a whole preference dataset or of one batch under the reference model. The
scorer of a run calls :func:`score_pairs`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import is_sharded
from bdpo_plugin.objective import mutual_information
from bdpo_plugin.reference.batches import SCORE_TOKENS, budgeted_batches
from bdpo_plugin.reference.distributed import raised_by_all, share, this_rank, world_size
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.required_scores import RequiredScores, required_scores
from bdpo_plugin.reference.scoring import Score, score_requests
from bdpo_plugin.reference.shared_store import ABSENT, NOT_FINITE, Exchange
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.reference.verification import verify
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.terminal import visible


class PairScores(NamedTuple):
    """The scores of B pairs under the reference; all (B,), the first six float32 or int64 on the
    CPU.

    Attributes:
        ref_chosen_logps, ref_rejected_logps: log pi_ref(y|x), nats, summed.
        mi_chosen, mi_rejected: I(x; y), nats per token, or nats if not normalised; NaN if not
            measured.
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

    @property
    def measured(self) -> bool:
        """Whether the mutual information was measured."""
        return not bool(self.mi_chosen.isnan().any())


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
    with_mi: bool = True,
) -> PairScores:
    """Computes the log-probabilities and the mutual information of all pairs under the reference
    (method section 3).

    With a `store`, stored scores are reused. Some of those that other runs have stored are computed
    again, to verify that they belong to this reference. New scores are stored while the reference
    pass runs. The ranks of a distributed run share the work, and so do several runs that use one
    store at the same time. Without a store, every rank scores its own pairs.

    Args:
        pairs: B preference pairs, after truncation; the same in every rank if there is a store.
        reference: the reference model.
        null_prompt: the null prompt of the run.
        settings: the settings of the run.
        reader: the reader of the run.
        device: the device of the run.
        store: the store of the reference's scores; None: nothing is reused or stored.
        name: the name of the dataset, for the progress bar.
        rows: the row numbers of the pairs for error messages; default: positions.
        with_mi: whether to measure the mutual information; if False, no response is run after the
            null prompt.

    Raises:
        BDPOError: A score is missing or not finite (the message lists the rows), or the pairs
            differ between the ranks.
    """
    required = required_scores(
        pairs,
        null_prompt if with_mi else None,
        with_gain=settings.mi_estimator == "expected",
    )
    rows = range(len(pairs)) if rows is None else rows
    scores = np.full((len(required.requests), required.columns), ABSENT)
    exchange = None
    budget = settings.score_tokens or SCORE_TOKENS
    if store:
        exchange = Exchange(store, required, scores, rows=rows, name=name, device=device)
        if len(reused := exchange.earlier()):
            exchange.verified(
                verify(
                    required.requests,
                    scores,
                    reused,
                    reference,
                    reader=reader,
                    device=device,
                    tokens=budget,
                    lockstep=_in_lockstep(reference),
                )
            )
    missing = np.flatnonzero(scores[:, 0] == ABSENT)
    computed = np.zeros(len(scores), dtype=bool)
    if len(missing):
        scores, computed = _compute(
            required,
            scores,
            missing[np.argsort(required.first[missing])],
            reference,
            budget,
            reader=reader,
            device=device,
            exchange=exchange,
            name=name,
        )
    _check_coverage(scores[required.of_pair], rows)

    of_pair = torch.from_numpy(scores[required.of_pair]).float()  # (B, scores, columns)
    of_side = of_pair.unflatten(1, (2, -1)).movedim(0, -1).contiguous()  # (2, scores, columns, B)
    logps = of_side[:, 0, 0]
    lengths = torch.tensor([len(side.completion_ids) for pair in pairs for side in pair])
    lengths = lengths.reshape(-1, 2).T.contiguous()
    normalize = settings.mi_normalize
    if not with_mi:
        mi = torch.full_like(logps, torch.nan)
    elif settings.mi_estimator == "expected":
        mi = of_side[:, 0, 1] / lengths if normalize else of_side[:, 0, 1]
    else:
        sides = zip(logps, of_side[:, 1, 0], lengths, strict=True)
        mi = torch.stack([mutual_information(*side, normalize=normalize) for side in sides])
    return PairScores(
        ref_chosen_logps=logps[0],
        ref_rejected_logps=logps[1],
        mi_chosen=mi[0],
        mi_rejected=mi[1],
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
        computed=torch.from_numpy(computed[required.of_pair].any(axis=1)),
    )


def _compute(
    required: RequiredScores,
    scores: np.ndarray,
    missing: np.ndarray,
    reference: Reference,
    token_budget: int,
    *,
    reader: ResponseReader,
    device: torch.device,
    exchange: Exchange | None,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the `missing` scores. With an `exchange`, the ranks share the work and each gets all
    scores.

    Returns:
        (n, columns) scores, and (n,) bool, whether each was computed in this call.
    """
    requests = required.requests
    batches = [
        missing[batch].tolist()
        for batch in budgeted_batches(
            [requests[i] for i in missing], token_budget, shared=reader.shares(reference.model)
        )
    ]
    tokens = np.zeros(len(requests), dtype=np.int64)
    tokens[missing] = [requests[i].rows * requests[i].length for i in missing]
    lockstep = _in_lockstep(reference)
    if lockstep:
        batches = _as_many(batches, same=exchange is not None, device=device)
    elif exchange:
        batches = share(batches, tokens)
        rest = batches[1:]  # the longest batch stays first, so that a lack of memory shows early
        random.Random().shuffle(rest)  # another run on this store should compute other batches
        batches[1:] = rest
    mine = np.zeros(len(requests), dtype=bool)
    mine[[i for batch in batches for i in batch]] = True
    computed = np.zeros(len(requests), dtype=bool)
    progress = tqdm(
        total=sum(int(tokens[batch].sum()) for batch in batches),
        desc=f"Scoring the {visible(name)} data with the reference model",
        unit="tok",
        unit_scale=True,
        disable=exchange is None or this_rank() != 0,
    )

    def absent(batch: list[int]) -> list[int]:
        return [i for i in batch if scores[i, 0] == ABSENT]

    apart = exchange is not None and not lockstep  # the ranks may run different batches
    try:
        with progress, reference.activated() as model:
            found = score_requests(
                model,
                reader,
                requests,
                batches,
                device,
                lockstep=lockstep,
                left=absent if apart else list,
            )
            for batch, batch_scores in raised_by_all(found) if apart else found:
                scores[batch] = _array(batch_scores, required.columns)
                computed[batch] = True
                progress.update(int(tokens[batch].sum()))
                if exchange and exchange.give(batch):
                    exchange.write()
                    if apart:
                        taken = exchange.take()
                        progress.update(int(tokens[taken[mine[taken]]].sum()))
    finally:
        if exchange:
            exchange.write()
    return exchange.of_all_ranks(computed) if exchange else (scores, computed)


def _in_lockstep(reference: Reference) -> bool:
    """Whether all ranks must run the same number of batches, because the model is sharded and no
    rank can run it alone."""
    return world_size() > 1 and is_sharded(reference.model)


def _as_many(batches: list[list[int]], *, same: bool, device: torch.device) -> list[list[int]]:
    """Returns the batches of this rank, with the last one repeated so that every rank has the same
    number of batches.

    Args:
        batches: the batches of all ranks if `same`, else those of this rank.
        same: whether every rank passes the same batches, to be split among the ranks.
        device: the device of this rank.
    """
    if same:
        batches = batches + [batches[-1]] * (-len(batches) % world_size())
        return batches[this_rank() :: world_size()]
    most = torch.tensor(len(batches), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [batches[-1]] * (int(most) - len(batches))


def _array(scores: list[Score], columns: int) -> np.ndarray:
    """Converts scores to an (n, columns) array, with :data:`NOT_FINITE` for values that are not
    finite."""
    values = np.array(scores, dtype=np.float64)[:, :columns]
    return np.where(np.isfinite(values), values, NOT_FINITE)


def _check_coverage(scores: np.ndarray, rows: Sequence[int]) -> None:
    """Checks that all (B, k, columns) scores are present and finite.

    Raises:
        BDPOError: A score is missing or not finite; the message lists the first rows.
    """
    for problem, bad in (
        ("has no score", scores == ABSENT),
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
