"""Computes the scores of one batch or of a whole preference dataset under the reference model. The
scorer of a run calls :func:`score_pairs` and :func:`score_dataset`."""

from __future__ import annotations

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
from bdpo_plugin.reference.required_scores import pair_requests, required_scores
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests
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
    with_mi: bool = True,
) -> PairScores:
    """Computes the log-probabilities and the mutual information of some pairs under the reference
    (method section 3), for example of the batch of a training step. Every rank scores its own
    pairs, and nothing is stored.

    Args:
        pairs: B preference pairs, after truncation.
        with_mi: whether to measure the mutual information; if False, no response is run after the
            null prompt.

    Raises:
        BDPOError: A score is missing or not finite; the message lists the positions of the pairs.
    """
    with_gain = with_mi and settings.mi_estimator == "expected"
    requests = pair_requests(pairs, null_prompt if with_mi else None, with_gain=with_gain)
    batches = _batches(requests, reference, settings, reader)
    lockstep = _in_lockstep(reference)
    if lockstep:
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        batches += [batches[-1]] * (int(most) - len(batches))
    scores = np.full((len(requests), 1 + with_gain), ABSENT)
    with reference.activated() as model:
        for batch, of_batch in score_requests(
            model, reader, requests, batches, device, lockstep=lockstep
        ):
            scores[batch] = _marked(of_batch)
    of_pair = scores.reshape(len(pairs), -1, 1 + with_gain)
    _check_coverage(of_pair, range(len(pairs)))
    computed = torch.ones(len(pairs), dtype=torch.bool)
    return _pair_scores(of_pair, pairs, settings, computed, with_mi=with_mi)


def score_dataset(
    pairs: Sequence[Pair],
    reference: Reference,
    null_prompt: NullPrompt,
    settings: BDPOSettings,
    *,
    reader: ResponseReader,
    device: torch.device,
    store: ScoreStore,
    name: str = "",
    rows: Sequence[int] | None = None,
    with_mi: bool = True,
) -> PairScores:
    """Computes the scores of all pairs of a dataset, as :func:`score_pairs` does for a batch.

    Stored scores are reused; some of them are computed again, to verify that they belong to this
    reference. New scores are stored while the reference pass runs. The ranks of a distributed run
    share the work, and each distinct score is computed once.

    Args:
        pairs: B preference pairs, after truncation; the same in every rank.

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
                tokens=settings.score_tokens or SCORE_TOKENS,
                lockstep=_in_lockstep(reference),
            )
        )
    computed = np.zeros(len(scores), dtype=bool)
    missing = np.flatnonzero(scores[:, 0] == ABSENT)
    if len(missing):
        # in the order of the pairs, so that those of one pair can share a batch
        missing = missing[np.argsort(required.first[missing])]
        batches = _batches([required.requests[i] for i in missing], reference, settings, reader)
        _compute(
            required.requests,
            [missing[batch].tolist() for batch in batches],
            scores,
            computed,
            reference,
            reader=reader,
            device=device,
            exchange=exchange,
            name=name,
        )
        scores, computed = exchange.of_all_ranks(computed)
    of_pair = scores[required.of_pair]
    _check_coverage(of_pair, rows)
    of_pairs = torch.from_numpy(computed[required.of_pair].any(axis=1))
    return _pair_scores(of_pair, pairs, settings, of_pairs, with_mi=with_mi)


def _batches(
    requests: Sequence[ScoreRequest],
    reference: Reference,
    settings: BDPOSettings,
    reader: ResponseReader,
) -> list[list[int]]:
    budget = settings.score_tokens or SCORE_TOKENS
    return budgeted_batches(requests, budget, shared=reader.shares(reference.model))


def _compute(
    requests: Sequence[ScoreRequest],
    batches: list[list[int]],
    scores: np.ndarray,
    computed: np.ndarray,
    reference: Reference,
    *,
    reader: ResponseReader,
    device: torch.device,
    exchange: Exchange,
    name: str,
) -> None:
    """Computes this rank's share of the batches of all ranks, the longest first, and stores the
    scores while it runs. Writes the (n, columns) scores, and in (n,) `computed` which they are, in
    place."""
    tokens = np.array([request.rows * request.length for request in requests])
    lockstep = _in_lockstep(reference)
    if lockstep:  # with the last batch repeated, so that every rank has the same number
        batches = batches + [batches[-1]] * (-len(batches) % world_size())
        batches = batches[this_rank() :: world_size()]
    else:
        batches = share(batches, tokens)
    progress = tqdm(
        total=sum(int(tokens[batch].sum()) for batch in batches),
        desc=f"Scoring the {visible(name)} data with the reference model",
        unit="tok",
        unit_scale=True,
        disable=this_rank() != 0,
    )
    try:
        with progress, reference.activated() as model:
            found = score_requests(model, reader, requests, batches, device, lockstep=lockstep)
            for batch, of_batch in found if lockstep else raised_by_all(found):
                scores[batch] = _marked(of_batch)
                computed[batch] = True
                progress.update(int(tokens[batch].sum()))
                exchange.give(batch)
    finally:
        exchange.write()


def _pair_scores(
    scores: np.ndarray,
    pairs: Sequence[Pair],
    settings: BDPOSettings,
    computed: Tensor,
    *,
    with_mi: bool,
) -> PairScores:
    """Computes the mutual information of B pairs from their (B, k, columns) scores, in the order of
    :func:`~bdpo_plugin.reference.required_scores.pair_requests`."""
    of_pair = torch.from_numpy(scores).float()
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
        computed=computed,
    )


def _in_lockstep(reference: Reference) -> bool:
    """Whether all ranks must run the same number of batches, because the model is sharded and no
    rank can run it alone."""
    return world_size() > 1 and is_sharded(reference.model)


def _marked(scores: np.ndarray) -> np.ndarray:
    """Returns scores with :data:`NOT_FINITE` in the place of values that are not finite."""
    return np.where(np.isfinite(scores), scores, NOT_FINITE)


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
