"""Computes log-probabilities and information gain of completions under the frozen reference, in
batches (method section 3). The reference pass and the verification of stored scores call it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.head import Head, block_rows, statistics, sum_by_row
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.objective.mutual_information import information_gain
from bdpo_plugin.settings import BDPOError

#: The version of the computation of scores, a part of every reference's identity. Raise it with
#: each change that changes scores by more than rounding: runs then no longer find scores that were
#: stored before.
VERSION = 1

#: The number of batches that may be queued on a device before the scores of the first are read.
BEHIND = {"cpu": 0}


class ScoreRequest(NamedTuple):
    """One completion to score after one prompt; all fields are (n,) token ids.

    If `null_prompt_ids` is given, the information gain over the null prompt is computed as well.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    null_prompt_ids: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return 1 if self.null_prompt_ids is None else 2

    @property
    def length(self) -> int:
        null = 0 if self.null_prompt_ids is None else len(self.null_prompt_ids)
        return max(len(self.prompt_ids), null) + len(self.completion_ids)


class _Sums:
    """The scores of a batch, whose copy to the CPU may still be running."""

    def __init__(self, sums: Tensor) -> None:
        self._copied: Any = None
        if sums.is_cuda:
            # the copy is queued right after its own batch, so reading it waits for no later batch
            device, sums = sums.device, sums.to("cpu", non_blocking=True)
            self._copied = torch.cuda.current_stream(device).record_event()
        self._sums = sums

    def scores(self) -> np.ndarray:
        """Returns the (B, 1 or 2) scores. Waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return np.array(self._sums.tolist())


def score_requests(
    model: nn.Module,
    reader: ResponseReader,
    requests: Sequence[ScoreRequest],
    batches: Sequence[list[int]],
    device: torch.device,
    *,
    lockstep: bool = False,
    packed: bool = True,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields the indices and the scores of each batch as soon as they are computed.

    The scores of B requests are (B, 1) log-probabilities log pi_ref(y | x), or (B, 2) with the
    information gain over the null prompt; in nats, summed over the completion tokens.

    A batch that does not fit in memory is halved. A batch with scores that are not finite runs once
    more with padding, to find out which requests they belong to, because in a packed row they
    affect the others. Except on the CPU, the scores of a batch are read after the next batch is
    queued, so that the device is never idle. If an error occurs, the batches queued before it are
    yielded before it is raised.

    Args:
        requests: the requests, either all with a null prompt or none.
        lockstep: whether to run exactly the given batches, and to read each at once; needed for a
            sharded model, of which all ranks must run the same number of batches.

    Raises:
        BDPOError: A single sequence, or a batch with `lockstep`, does not fit in the device's
            memory.
    """
    todo = deque((batch, packed) for batch in batches)  # each batch with whether it may be packed
    queued: deque[tuple[list[int], bool, _Sums]] = deque()
    behind = 0 if lockstep else BEHIND.get(device.type, 1)
    while todo or queued:
        if todo:
            batch, may_pack = todo.popleft()
            of_batch = [requests[i] for i in batch]
            sums = None
            try:
                sums = _queue(of_batch, model, reader, device, may_pack=may_pack)
            except torch.OutOfMemoryError as error:
                if lockstep or len(batch) == 1:
                    yield from _read_all(queued)
                    raise _no_room(of_batch) from error
            except BaseException:
                yield from _read_all(queued)
                raise
            # Outside of the handler, because inside it the exception still holds the tensors of the
            # forward pass.
            if sums is None:
                # all remaining batches are halved too, because they would not fit either
                parts = [(batch, may_pack), *todo]
                todo = deque((half, packed) for b, packed in parts for half in _halves(b))
                _free_memory(device)
                continue
            queued.append((batch, may_pack, sums))
        if len(queued) > behind or not todo:
            batch, may_pack, sums = queued.popleft()
            scores = sums.scores()
            again = may_pack and not lockstep and len(batch) > 1
            if again and not np.isfinite(scores).all():
                todo.appendleft((batch, False))
            else:
                yield batch, scores


def _free_memory(device: torch.device) -> None:
    """Returns memory that this process no longer uses to the device."""
    gc.collect()  # reference cycles, such as those of an exception with its own frame
    empty: Callable[[], None] | None
    if empty := getattr(torch.get_device_module(device), "empty_cache", None):
        empty()


def _halves(batch: list[int]) -> list[list[int]]:
    """Returns the two halves of a batch, the larger one first; a single request stays whole."""
    middle = -(-len(batch) // 2)
    return [half for half in (batch[:middle], batch[middle:]) if half]


def _no_room(requests: Sequence[ScoreRequest]) -> BDPOError:
    """Returns the error for a batch that does not fit in memory and cannot be halved."""
    if len(requests) > 1:
        return BDPOError(
            "A scoring batch does not fit in the memory of the device. The ranks share the "
            "model, so that none can go on with smaller batches alone: lower "
            "`bdpo_score_tokens`. What has been scored is kept."
        )
    return BDPOError(
        f"A sequence of {requests[0].length} tokens alone does not fit in the "
        "memory of the device under the reference model: shorten the host's sequence "
        "length, or load the model in fewer bits."
    )


def _read_all(
    queued: deque[tuple[list[int], bool, _Sums]],
) -> Iterator[tuple[list[int], np.ndarray]]:
    for batch, _, sums in queued:
        yield batch, sums.scores()


def _queue(
    requests: list[ScoreRequest],
    model: nn.Module,
    reader: ResponseReader,
    device: torch.device,
    *,
    may_pack: bool,
) -> _Sums:
    """Queues a batch of B requests on the device: their log-probabilities, and the information
    gains if requested. Does not wait for the results."""
    rows = [(request.prompt_ids, request.completion_ids) for request in requests]
    rows += [
        (request.null_prompt_ids, request.completion_ids)
        for request in requests
        if request.null_prompt_ids is not None
    ]
    with_gain = len(rows) > len(requests)
    input_ids = torch.zeros(len(rows), max(len(p) + len(r) for p, r in rows), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[i, :length] = torch.from_numpy(np.concatenate([prompt, response]))
        attention_mask[i, :length] = 1
        positions[i, len(prompt) - 1 : length - 1] = True
    tokens = torch.from_numpy(np.concatenate([r for _, r in rows]))

    def read(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        labels = to_device(tokens, hidden.device)
        if not with_gain:
            return statistics(hidden, head, labels, extras=False).logps, hidden.new_zeros(0)
        half = len(hidden) // 2
        logps, gains = [], []
        size = max(1, head.rows // 2)
        halves = (hidden[:half], hidden[half:], labels[:half])
        for cond, null, target in zip(*(h.split(size) for h in halves), strict=True):
            chunk = head.project(cond), head.project(null), target[:, None]
            block = block_rows(chunk[0])
            for *logits, label in zip(*(c.split(block) for c in chunk), strict=True):
                # log_softmax on the CPU loses the small terms of a large vocabulary
                cond, null = (x.sub_(x.logsumexp(dim=-1, keepdim=True)) for x in logits)
                logps.append(cond.gather(-1, label).squeeze(-1))
                gains.append(information_gain(cond, null))
        return torch.cat(logps), torch.cat(gains)

    (logps, gains), _ = reader.read(
        model,
        positions,
        read,
        may_pack=may_pack,
        device=device,
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
    )
    columns = [logps, gains] if with_gain else [logps]
    sums = [sum_by_row(column, positions[: len(requests)]) for column in columns]
    return _Sums(torch.stack(sums, dim=1))
