"""Token ids -> log-probabilities and information gain under a frozen reference."""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdpo_plugin.model.device import to_device
from bdpo_plugin.model.head import Head, block_rows, statistics, sum_by_row
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import unwrapped
from bdpo_plugin.objective.mutual_information import information_gain
from bdpo_plugin.reference.distributed import gathered
from bdpo_plugin.settings import BDPOError

#: The release of the way that scores are computed, a part of every reference's identity. It is
#: raised with each change after which a score of the same tokens by the same model is another
#: number, beyond rounding: what was stored before is then found no more.
VERSION = 1

#: How many batches may be queued on a device before the scores of the first are read.
BEHIND = {"cpu": 0}


#: Tokens of a scoring batch where nobody says. On a CPU larger ones are slower: what a layer makes
#: of them leaves the processor's cache.
SCORE_TOKENS = 1024

#: The same on a GPU, at least and at most, where it is busy with a batch.
SCORE_TOKENS_ON_GPU = (4096, 16384)

#: Numbers that a layer makes of each token, for each entry of its hidden state: those that it would
#: keep for a backward pass (Korthikanti et al., arXiv 2205.05198, section 4.1: 34 bytes of 16 bits
#: each), which is more than a pass without gradient holds at once.
STATES = 17


class ScoreRequest(NamedTuple):
    """One completion to score after one prompt; all (n,) token ids.

    With `null_prompt_ids`, the information gain over the null prompt is computed as well.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    null_prompt_ids: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return 1 if self.null_prompt_ids is None else 2

    @property
    def length(self) -> int:
        prompts = (
            [self.prompt_ids]
            if self.null_prompt_ids is None
            else [self.prompt_ids, self.null_prompt_ids]
        )
        return max(len(p) for p in prompts) + len(self.completion_ids)


class Score(NamedTuple):
    """Of one response after one prompt under the reference, in nats.

    Attributes:
        logps: log pi_ref(y | x), summed over the response tokens.
        gain: summed KL to the distribution after the null prompt; None where not wanted.
    """

    logps: float
    gain: float | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.logps) and (self.gain is None or math.isfinite(self.gain))


def budgeted_batches(
    requests: Sequence[ScoreRequest], token_budget: int, *, shared: bool = False
) -> list[list[int]]:
    """Indices of `requests` in batches of similar length, the longest first.

    A batch holds at most `token_budget` tokens, or a single group: two requests that follow one
    another among those of their prompt, such as those of a preference pair. They stay together, as
    what they have in common may be run once.

    Args:
        shared: whether batches are laid in rows in which that is so; then the tokens of the rows
            count, else those of the padded batches.
    """
    groups: list[list[int]] = []
    of_one: dict[bytes, list[int]] = {}  # the group of a single request so far, by its prompt
    for index, request in enumerate(requests):
        prompt = request.prompt_ids.tobytes()
        group = of_one.pop(prompt, None)
        if group is None:
            group = of_one[prompt] = []
            groups.append(group)
        group.append(index)

    def size(group: list[int]) -> tuple[int, int, int]:
        """Tokens of the longest, rows, and tokens where what is in common stands once."""
        of_group = [requests[i] for i in group]
        nulls = [
            len(request.null_prompt_ids)
            for request in of_group
            if request.null_prompt_ids is not None
        ]
        rows = sum(request.rows for request in of_group)
        responses = sum(request.rows * len(request.completion_ids) for request in of_group)
        beginnings = len(of_group[0].prompt_ids) + max(nulls, default=0)
        return max(request.length for request in of_group), rows, beginnings + responses

    batches: list[list[int]] = []
    width, rows, tokens = 0, 0, 0  # of the last batch
    for group, (longest, more_rows, more_tokens) in sorted(
        ((group, size(group)) for group in groups), key=lambda sized: sized[1], reverse=True
    ):
        rows, tokens = rows + more_rows, tokens + more_tokens
        if batches and (tokens if shared else rows * width) <= token_budget:
            batches[-1] += group
        else:
            batches.append(group)
            width, rows, tokens = longest, more_rows, more_tokens
    return batches


def token_budget(model: Any, device: torch.device) -> int:
    """Tokens of a scoring batch where nobody says, the same in every rank; on a GPU as many as
    take a quarter of its free memory."""
    if device.type == "cpu":
        return SCORE_TOKENS
    least, most = SCORE_TOKENS_ON_GPU
    fit = least
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        config = unwrapped(model).config.get_text_config()
        fit = free // 4 // (config.hidden_size * STATES * torch.float32.itemsize)
    return int(min(gathered(min(max(fit, least), most))))


class _Sums:
    """What :func:`_queue` has made of a batch: (B, 1 or 2) sums, on their way to the CPU."""

    def __init__(self, sums: Tensor) -> None:
        self._copied: Any = None
        if sums.is_cuda:
            # the copy stands right behind its own batch, so that reading it waits for no other
            device, sums = sums.device, sums.to("cpu", non_blocking=True)
            self._copied = torch.cuda.current_stream(device).record_event()
        self._sums = sums

    def scores(self) -> list[Score]:
        """Of the requests of the batch; here the device is waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = self._sums.tolist()
        return [Score(logps, *gain) if gain else Score(logps, None) for logps, *gain in rows]


def score_requests(
    model: nn.Module,
    reader: ResponseReader,
    requests: Sequence[ScoreRequest],
    batches: Sequence[list[int]],
    device: torch.device,
    *,
    lockstep: bool = False,
    packed: bool = True,
    left: Callable[[list[int]], list[int]] = list,
) -> Iterator[tuple[list[int], list[Score]]]:
    """The scores of each batch, as it is done.

    A batch that does not fit in memory is halved, and one whose scores are not all finite is run
    once more, padded, to be sure whose they are: in a packed row they spoil the others. Elsewhere
    than on the CPU, a batch's scores are read once the next one is queued, so that the device does
    not wait. What was queued before an error is yielded before it is raised.

    Args:
        in_step: run the given batches and no other, and read each at once: the ranks of a sharded
            model have to run the same number of them.
        packed: whether batches may be run without their padding.
        left: of a batch whose turn it is, the part that is still wanted; default all of it.

    Raises:
        BDPOError: a single sequence, or a batch `in_step`, does not fit in the device's memory.
    """
    todo = deque((batch, packed) for batch in batches)  # and whether it may be packed
    queued: deque[tuple[list[int], bool, _Sums]] = deque()
    behind = 0 if lockstep else BEHIND.get(device.type, 1)
    while todo or queued:
        if todo:
            batch, may_pack = todo.popleft()
            if not (batch := left(batch)):
                continue
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
            # outside of the handler: until its end the error keeps what the forward pass had made
            if sums is None:
                # the batches that follow would not fit either
                parts = [(batch, may_pack), *todo]
                todo = deque((half, packed) for b, packed in parts for half in _halves(b))
                _free_memory(device)
                continue
            queued.append((batch, may_pack, sums))
        if len(queued) > behind or not todo:
            batch, may_pack, sums = queued.popleft()
            scores = sums.scores()
            again = may_pack and not lockstep and len(batch) > 1
            if again and not all(score.finite for score in scores):
                todo.appendleft((batch, False))
            else:
                yield batch, scores


def _free_memory(device: torch.device) -> None:
    """Give back to a device what nothing in this process holds any more."""
    gc.collect()  # what is held in circles, such as by an error that knows its own frame
    empty: Callable[[], None] | None
    if empty := getattr(torch.get_device_module(device), "empty_cache", None):
        empty()


def _halves(batch: list[int]) -> list[list[int]]:
    """A batch's two halves, the first the larger; of a single request, itself."""
    middle = -(-len(batch) // 2)
    return [half for half in (batch[:middle], batch[middle:]) if half]


def _no_room(requests: Sequence[ScoreRequest]) -> BDPOError:
    """Of a batch that does not fit in memory and cannot be halved."""
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
) -> Iterator[tuple[list[int], list[Score]]]:
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
    """The log-probabilities of B requests, and the gains; the device may not be there yet."""
    rows = [(request.prompt_ids, request.completion_ids) for request in requests]
    rows += [
        (request.null_prompt_ids, request.completion_ids)
        for request in requests
        if request.null_prompt_ids is not None
    ]
    with_gain = len(rows) > len(requests)
    batch, width = len(rows), max(len(p) + len(r) for p, r in rows)
    input_ids = torch.zeros(batch, width, dtype=torch.long)
    attention_mask = torch.zeros(batch, width, dtype=torch.long)
    positions = torch.zeros(batch, width, dtype=torch.bool)
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
                # not log_softmax, which on the CPU loses the small terms of a large vocabulary
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
