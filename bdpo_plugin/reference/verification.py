"""Verifies reused scores: computes some of the scores that a run takes from a store again. The
reference pass calls it.

The identity of a reference (:mod:`~bdpo_plugin.reference.fingerprint`) should distinguish any two
references with different scores. If it fails to, the verification finds this before training.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.rounding import rounding_of
from bdpo_plugin.reference.distributed import gathered, raised_by_all
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests
from bdpo_plugin.reference.store import Verification

#: The most scores of a dataset that are computed again, and the most tokens of these, padded.
SCORES, TOKENS = 8, 4096

#: No further score is computed again after this time, in seconds, unless the ranks must run the
#: same batches.
SECONDS = 0.5

#: The parameters of :func:`rounding`. PER_TOKEN: nats for each unit of the dtype's precision and
#: each square root of the number of response tokens. LEAST: the lower bound of PER_TOKEN times that
#: precision, in nats. PER_NAT: nats for each unit of float32's precision and each nat of the sum.
PER_TOKEN, LEAST, PER_NAT = 8.0, 1e-4, 8.0

#: For a model whose scores depend on the batch: the allowed difference, as a multiple of the
#: difference between a score computed alone and computed in a batch.
_BATCHES = 3.0


def verify(
    requests: Sequence[ScoreRequest],
    scores: np.ndarray,
    reused: np.ndarray,
    reference: Reference,
    *,
    reader: ResponseReader,
    device: torch.device,
    tokens: int,
    lockstep: bool,
) -> Verification:
    """Computes some of the reused scores again, the same in every rank, each in a batch of one
    request.

    A score is confirmed if it differs from the stored one by no more than :func:`rounding`. If one
    differs by more, all these scores are computed once more, in one padded batch. The scores of
    some models depend on the rest of the batch (through the router, the padding or 8-bit
    quantisation). For these, differences up to a few times the difference between the two
    computations are allowed.

    Args:
        requests: the n scores that the reference pass needs.
        scores: (n, 1 or 2) the known scores, nats.
        reused: (m,) the indices of the scores to choose from, the same in every rank.
        reference: the reference model.
        reader: the reader of the run.
        device: the device of this rank.
        tokens: the most tokens of one batch.
        lockstep: whether the model is sharded over the ranks, so that all must run the same
            batches.

    Raises:
        BDPOError: A sequence does not fit in the device's memory.
    """
    chosen, beside = gathered(_chosen(requests, reused, min(tokens, TOKENS)))[0]
    columns = scores.shape[1]

    def computed(batches: list[list[int]], seconds: float) -> dict[int, np.ndarray]:
        again: dict[int, np.ndarray] = {}
        found = score_requests(
            model, reader, requests, batches, device, lockstep=lockstep, packed=False
        )
        for batch, of_batch in found if lockstep else raised_by_all(_in_time(found, seconds)):
            values = np.array(of_batch, dtype=np.float64)[:, :columns]
            again |= dict(zip(batch, values, strict=True))
        return again

    with reference.activated() as model:
        alone = computed([[i] for i in chosen], SECONDS)
        done = list(alone)
        now = np.stack([alone[i] for i in done])
        difference = np.abs(now - scores[done]).max(axis=1)
        autocast = torch.is_autocast_enabled(device.type)
        dtypes = [torch.get_autocast_dtype(device.type)] if autocast else []
        # stored scores are float32
        eps = max(rounding_of(model, dtypes, device), torch.finfo(torch.float32).eps)
        allowed = rounding(eps, [requests[i] for i in done], scores[done, 0])
        found = _verdict(difference, allowed)
        if found.beyond:
            batch = computed([done + (beside if len(done) == 1 else [])], math.inf)
            noise = np.abs(now - np.stack([batch[i] for i in done]))
            allowed = np.maximum(allowed, _BATCHES * noise[np.isfinite(noise)].max(initial=0.0))
            found = _verdict(difference, allowed)
    return found


def _in_time(results: Iterator[Any], seconds: float) -> Iterator[Any]:
    """Yields results until so many seconds after the first one."""
    end = math.inf
    for result in results:
        yield result
        end = min(end, time.monotonic() + seconds)
        if time.monotonic() >= end:
            return


def _chosen(
    requests: Sequence[ScoreRequest], reused: np.ndarray, tokens: int
) -> tuple[list[int], list[int]]:
    """Chooses reused scores at random, as many as fit into a batch, the shortest first.

    Returns:
        Their indices, and a list with the index of the request whose length differs most from the
        shortest of them, empty if there is no other request. That request is added to the padded
        batch if only one score was chosen.
    """
    draw = random.Random()
    some = draw.sample(reused.tolist(), min(SCORES, len(reused)))
    some.sort(key=lambda i: requests[i].length)
    rows = np.cumsum([requests[i].rows for i in some])
    fit = sum(int(rows[k]) * requests[i].length <= tokens for k, i in enumerate(some))
    length = requests[some[0]].length
    other = max(range(len(requests)), key=lambda i: abs(requests[i].length - length))
    return some[: max(1, fit)], [other] if other != some[0] else []


def _verdict(difference: np.ndarray, allowed: np.ndarray) -> Verification:
    """Combines the differences of all ranks into one result; NaN counts as beyond rounding."""
    beyond = int((~(difference <= allowed)).sum())
    of_ranks = gathered(
        (len(difference), beyond, float(np.nan_to_num(difference, nan=np.inf).max()))
    )
    count, beyond, greatest = max(of_ranks, key=lambda rank: (rank[1] > 0, rank[2]))
    return Verification(count, beyond, greatest)


def rounding(eps: float, requests: Sequence[ScoreRequest], logps: np.ndarray) -> np.ndarray:
    """Returns the (n,) differences in nats that rounding explains, for the scores of n responses.

    A logit has a rounding error of half of `eps` times its size, which is up to about 30 in
    language models. The errors of the tokens are independent, so their sum grows as the square root
    of the number of tokens. The sum itself is computed in float32.

    Args:
        eps: the precision of the model's dtype.
        requests: the n requests.
        logps: (n,) their log-probabilities, nats.
    """
    lengths = np.array([len(request.completion_ids) for request in requests])
    in_sum = float(torch.finfo(torch.float32).eps) * PER_NAT * np.abs(logps)
    found: np.ndarray = max(PER_TOKEN * eps, LEAST) * np.sqrt(lengths) + in_sum
    return found
