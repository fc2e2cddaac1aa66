"""A whole preference dataset -> its scores, computed once and shared by all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from bdpo_plugin.objective import mutual_information
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.output_layer import is_sharded
from bdpo_plugin.reference.pairs import Pair, Side
from bdpo_plugin.reference.projection import ResponseReader
from bdpo_plugin.reference.scoring import Job, Reference, budgeted_batches, score_jobs
from bdpo_plugin.reference.store import Score, ScoreStore, score_key
from bdpo_plugin.settings import BDPOError, BDPOSettings

#: Seconds of work that a killed run may lose.
_FLUSH_SECONDS = 2.0


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
    pass runs, and the ranks of a distributed run share the work. Without, every rank scores its
    own pairs.

    Args:
        pairs: B preference pairs, after truncation; the same in every rank if there is a store.
        name: of the dataset, on the progress bar.
        rows: what to call the pairs in an error; default their position.

    Raises:
        BDPOError: a score that is missing or not finite, with the rows.
    """
    null = np.asarray(null_prompt.ids, dtype=np.int64)
    expected = settings.mi_estimator == "expected"

    def jobs_of(side: Side) -> list[Job]:
        if expected:
            return [Job(side.prompt, side.response, null)]
        return [Job(side.prompt, side.response), Job(null, side.response)]

    wanted: dict[bytes, Job] = {}
    keys: list[list[bytes]] = []  # of each pair: those of its chosen side, then its rejected
    for pair in pairs:
        keys.append([])
        for job in (*jobs_of(pair.chosen), *jobs_of(pair.rejected)):
            key = score_key(job.prompt, job.null, job.response)
            wanted.setdefault(key, job)
            keys[-1].append(key)

    scores = _shared(_stored(store, wanted)) if store else {}
    missing = [key for key in wanted if key not in scores]
    computed = torch.tensor([any(k not in scores for k in pair) for pair in keys])
    if missing:
        scores |= _compute(
            [(key, wanted[key]) for key in missing],
            reference,
            settings.score_tokens,
            reader=reader,
            device=device,
            store=store,
            name=name,
        )
    _check_coverage(keys, scores, rows or range(len(pairs)))

    def side(index: int) -> tuple[Tensor, Tensor, Tensor]:
        sides = [pair[index] for pair in pairs]
        lengths = torch.tensor([len(s.response) for s in sides])
        first = [pair[index * len(pair) // 2] for pair in keys]
        logps = torch.tensor([scores[key].logps for key in first], dtype=torch.float32)
        if expected:
            gains = torch.tensor([scores[key].gain for key in first], dtype=torch.float32)
            return logps, gains / lengths if settings.mi_normalize else gains, lengths
        nulls = [pair[index * len(pair) // 2 + 1] for pair in keys]
        null_logps = torch.tensor([scores[key].logps for key in nulls], dtype=torch.float32)
        mi = mutual_information(logps, null_logps, lengths, normalize=settings.mi_normalize)
        return logps, mi, lengths

    chosen, rejected = side(0), side(1)
    return PairScores(
        chosen[0], rejected[0], chosen[1], rejected[1], chosen[2], rejected[2], computed
    )


def _stored(store: ScoreStore, wanted: dict[bytes, Job]) -> dict[bytes, Score]:
    return {key: score for key, score in store.read().items() if key in wanted}


def _compute(
    todo: list[tuple[bytes, Job]],
    reference: Reference,
    token_budget: int,
    *,
    reader: ResponseReader,
    device: torch.device,
    store: ScoreStore | None,
    name: str,
) -> dict[bytes, Score]:
    jobs = [job for _, job in todo]
    batches = budgeted_batches(jobs, token_budget)
    in_step = _world() > 1 and is_sharded(reference.model)
    if store:
        batches += [batches[-1]] * (-len(batches) % _world())
        batches = batches[_rank() :: _world()]
    elif in_step:  # each rank has pairs of its own
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        batches += [batches[-1]] * (int(most) - len(batches))
    done: dict[bytes, Score] = {}
    pending: dict[bytes, Score] = {}
    flushed = time.monotonic()
    progress = tqdm(
        total=sum(jobs[i].rows * jobs[i].length for batch in batches for i in batch),
        desc=f"Scoring the {name} data with the reference model",
        unit="tok",
        unit_scale=True,
        disable=store is None or _rank() != 0,
    )
    try:
        with progress, reference.in_force() as model:
            found = score_jobs(model, reader, jobs, batches, device, in_step=in_step)
            for batch, batch_scores in found:
                pending |= {todo[i][0]: s for i, s in zip(batch, batch_scores, strict=True)}
                progress.update(sum(jobs[i].rows * jobs[i].length for i in batch))
                if store and time.monotonic() - flushed > _FLUSH_SECONDS:
                    store.add(pending)
                    done, pending, flushed = done | pending, {}, time.monotonic()
    finally:
        if store:
            store.add(pending)
    done |= pending
    return _shared(done) if store else done


def _check_coverage(
    keys: list[list[bytes]], scores: dict[bytes, Score], rows: Sequence[int]
) -> None:
    for problem, bad in (
        ("has no score", lambda key: key not in scores),
        ("has a score that is not finite", lambda key: not scores[key].finite),
    ):
        found = [row for row, pair in zip(rows, keys, strict=True) if any(map(bad, pair))]
        if found:
            raise BDPOError(
                f"{len(found)} of {len(keys)} pairs: the reference model {problem} for them. "
                f"First rows: {', '.join(map(str, found[:10]))}. If the model runs in float16, "
                "load it in bfloat16 or float32; otherwise look at these rows."
            )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _shared(scores: dict[bytes, Score]) -> dict[bytes, Score]:
    """The union over the ranks."""
    if _world() == 1:
        return scores
    parts: list[Any] = [None] * _world()
    dist.all_gather_object(parts, scores)
    return {key: score for part in parts for key, score in part.items()}
