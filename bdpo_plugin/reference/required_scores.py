"""Lists the distinct scores that preference pairs need, and describes how the data of the ranks
differ. The reference pass calls it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.scoring import ScoreRequest
from bdpo_plugin.reference.store import KEY


class RequiredScores(NamedTuple):
    """The n distinct scores that B pairs need, in the order of their keys.

    Attributes:
        keys: (n,) the keys of the scores, sorted.
        requests: the request that computes each score.
        first: (n,) for each score its first index in the list of all requests of the pairs, which
            follows the order of the pairs.
        of_pair: (B, 2 or 4) for each pair the indices of its scores: first those of the chosen
            completion, then those of the rejected one. There are two for each completion, after the
            prompt and after the null prompt, if both are separate scores; else there is one.
        columns: the number of values of a score: 1, or 2 with the information gain.
    """

    keys: np.ndarray
    requests: list[ScoreRequest]
    first: np.ndarray
    of_pair: np.ndarray
    columns: int


def pair_requests(
    pairs: Sequence[Pair], null_prompt: NullPrompt | None, *, with_gain: bool
) -> list[ScoreRequest]:
    """Lists the requests whose scores pairs need, the same number for each pair: first those of its
    chosen completion, then those of its rejected one.

    Args:
        null_prompt: the null prompt; None if only log-probabilities after the prompt are needed.
        with_gain: whether to request the information gain over the null prompt instead of separate
            scores after the null prompt.
    """
    null = None if null_prompt is None else np.asarray(null_prompt.ids, dtype=np.int64)
    requests = []
    for pair in pairs:
        for prompt, completion in pair:
            if with_gain and null is not None:
                requests.append(ScoreRequest(prompt, completion, null))
            else:
                requests.append(ScoreRequest(prompt, completion))
                if null is not None:
                    requests.append(ScoreRequest(null, completion))
    return requests


def required_scores(
    pairs: Sequence[Pair], null_prompt: NullPrompt | None, *, with_gain: bool
) -> RequiredScores:
    """Lists the distinct scores that pairs need; the arguments are those of
    :func:`pair_requests`."""
    requests = pair_requests(pairs, null_prompt, with_gain=with_gain)
    distinct, first, places = np.unique(
        np.frombuffer(b"".join(map(score_key, requests)), KEY),
        return_index=True,
        return_inverse=True,
    )
    columns = 2 if with_gain and null_prompt is not None else 1
    of_pair = places.reshape(len(pairs), -1)
    return RequiredScores(distinct, [requests[i] for i in first], first, of_pair, columns)


def score_key(request: ScoreRequest) -> bytes:
    """Computes the key of a request's score, 16 bytes, from all its token ids."""
    parts = (request.prompt_ids, request.null_prompt_ids, request.completion_ids)
    return hashlib.blake2b(b"".join(map(_framed, parts)), digest_size=16).digest()


def _framed(ids: np.ndarray | None) -> bytes:
    """Encodes token ids, or None. The encoding begins with the length, so that different sequences
    of ids never give the same bytes when joined."""
    if ids is None:
        return b"none"
    return len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes()


def difference(ranks: list[tuple[np.ndarray, list[int]]], name: str) -> str:
    """Returns the error message for ranks whose pairs differ.

    Args:
        ranks: for each rank the (B, k) keys of its pairs and the B numbers of their rows.
    """
    counts = ", ".join(str(len(numbers)) for _, numbers in ranks)
    pairs, numbers = max(ranks, key=lambda rank: len(rank[1]))
    first = next(
        i
        for i, pair in enumerate(pairs)
        if any(i == len(keys) or (keys[i] != pair).any() for keys, _ in ranks)
    )
    return (
        f"The ranks of this run have different {name} data: {counts} pairs in ranks 0 to "
        f"{len(ranks) - 1}; the first that differs is row {numbers[first]}. Every rank "
        "has to make the same data in the same order; the host shares it out later. The usual "
        "reason is a shuffle or a sample without a fixed seed, files or tokenizers that are not "
        "the same on all machines, or a script that gives each rank a part."
    )
