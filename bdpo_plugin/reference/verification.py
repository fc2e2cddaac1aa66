"""Some of the scores that a run takes from a store, computed again.

The identity of a reference (:mod:`~bdpo_plugin.reference.fingerprint`) tells references apart that
give different scores. Where it fails to, it is seen here, before anything is trained.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference.distributed import gathered, raised_by_all
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests
from bdpo_plugin.reference.store import Verification

#: So many scores of a dataset are computed again at most, and so many tokens with their padding.
SCORES, TOKENS = 8, 4096

#: No further one is begun after so many seconds, where the ranks need not run the same.
SECONDS = 0.5

#: What rounding explains: nats for each unit of the dtype's precision and the square root of the
#: response's tokens, at least so many nats, and for each unit of float32's and nat of the sum.
PER_TOKEN, LEAST, PER_NAT = 8.0, 1e-4, 8.0

#: Of a model whose scores depend on the batch, this often the difference that a batch makes.
_BATCHES = 3.0

_COMPUTED_IN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """Compute some of the reused scores again, the same in every rank, each in a row of its own.

    A score is the stored one if they differ by no more than :func:`rounding`. Where one differs by
    more, all that were computed again are computed once more, in one padded batch: a model whose
    scores depend on what else is in a batch (its router's choice, its padding, its 8-bit codes)
    differs from itself, and what differs by less than a few times that passes.

    Args:
        requests: n scores that the pass needs.
        scores: (n, 1 or 2) what is known of them, nats.
        reused: (m,) indices of those to choose from, the same in every rank.
        tokens: of one batch.
        in_step: whether the ranks share the model, so that all have to run the same.

    Raises:
        BDPOError: a sequence does not fit in the device's memory.
    """
    chosen, beside = gathered(_chosen(requests, reused, min(tokens, TOKENS)))[0]
    columns = scores.shape[1]
    end = float("inf")

    def in_time(batch: list[int]) -> list[int]:
        return batch if lockstep or time.monotonic() < end else []

    def computed(batches: list[list[int]]) -> dict[int, np.ndarray]:
        nonlocal end
        again: dict[int, np.ndarray] = {}
        found = score_requests(
            model, reader, requests, batches, device, lockstep=lockstep, packed=False, left=in_time
        )
        for batch, of_batch in found if lockstep else raised_by_all(found):
            values = np.array(of_batch, dtype=np.float64)[:, :columns]
            again |= dict(zip(batch, values, strict=True))
            end = min(end, time.monotonic() + SECONDS)
        return again

    with reference.activated() as model:
        alone = computed([[i] for i in chosen])
        done = list(alone)
        now = np.stack([alone[i] for i in done])
        difference = np.abs(now - scores[done]).max(axis=1)
        allowed = rounding(precision(model), [requests[i] for i in done], scores[done, 0])
        found = _verdict(difference, allowed)
        if found.beyond:
            end = float("inf")
            batch = computed([done + (beside if len(done) == 1 else [])])
            noise = np.abs(now - np.stack([batch[i] for i in done]))
            allowed = np.maximum(allowed, _BATCHES * noise[np.isfinite(noise)].max(initial=0.0))
            found = _verdict(difference, allowed)
    return found


def _chosen(
    requests: Sequence[ScoreRequest], reused: np.ndarray, tokens: int
) -> tuple[list[int], list[int]]:
    """Some of the reused scores at random, the shortest first, as many as fit into a batch; and
    the one whose length differs most, to be padded with a single one."""
    draw = random.Random()
    some = draw.sample(reused.tolist(), min(SCORES, len(reused)))
    some.sort(key=lambda i: requests[i].length)
    rows = np.cumsum([requests[i].rows for i in some])
    fit = sum(int(rows[k]) * requests[i].length <= tokens for k, i in enumerate(some))
    length = requests[some[0]].length
    other = max(range(len(requests)), key=lambda i: abs(requests[i].length - length))
    return some[: max(1, fit)], [other] if other != some[0] else []


def _verdict(difference: np.ndarray, allowed: np.ndarray) -> Verification:
    """Of all ranks; nan is beyond anything."""
    beyond = int((~(difference <= allowed)).sum())
    of_ranks = gathered(
        (len(difference), beyond, float(np.nan_to_num(difference, nan=np.inf).max()))
    )
    count, beyond, greatest = max(of_ranks, key=lambda rank: (rank[1] > 0, rank[2]))
    return Verification(count, beyond, greatest)


def rounding(eps: float, requests: Sequence[ScoreRequest], logps: np.ndarray) -> np.ndarray:
    """The (n,) differences in nats that rounding explains, in the scores of n responses.

    A logit is rounded by half of `eps` times its size, which is up to some 30 in language models;
    the errors of the tokens are independent and so add up as the square root of their number. The
    sum is in float32.
    """
    lengths = np.array([len(request.completion_ids) for request in requests])
    in_sum = float(torch.finfo(torch.float32).eps) * PER_NAT * np.abs(logps)
    found: np.ndarray = max(PER_TOKEN * eps, LEAST) * np.sqrt(lengths) + in_sum
    return found


def precision(model: nn.Module) -> float:
    """The distance from 1 to the next number, in the coarsest dtype that a model computes in at
    this point."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    dtypes: set[Any] = {parameter.dtype for parameter in model.parameters()}
    # of layers whose weights are codes
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    found = max(torch.finfo(dtype).eps for dtype in dtypes & {*_COMPUTED_IN} | {torch.float32})
    exact = device != "cuda" or torch.get_float32_matmul_precision() == "highest"
    return found if exact else max(found, 2**-10)  # TF32
