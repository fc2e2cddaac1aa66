"""Communication between the ranks of a distributed run during the reference pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bdpo_plugin.settings import BDPOError


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first_on_machine() -> bool:
    """Whether this is the first rank on its machine. The ranks of a machine may share a disk."""
    return not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=this_rank()) == 0


def gathered(value: Any) -> list[Any]:
    """Gathers the values of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def maximum(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Returns the elementwise maximum of an array of floats over all ranks."""
    if world_size() == 1:
        return values
    shared = torch.from_numpy(values).to(device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.cpu().numpy()


def share(batches: Sequence[list[int]], tokens: np.ndarray) -> list[list[int]]:
    """Returns this rank's part of the batches. All parts have about the same number of tokens.

    Args:
        batches: batches of indices, the longest sequences first; the part keeps this order.
    """
    mine, loads = [], [0] * world_size()
    for batch in batches:
        rank = loads.index(min(loads))
        loads[rank] += int(tokens[batch].sum())
        if rank == this_rank():
            mine.append(batch)
    return mine


def raised_by_all(work: Iterator[Any]) -> Iterator[Any]:
    """Yields the results of this rank's share of the work; if one rank fails, all ranks stop.

    The ranks compare their state twice: after the first result, whose batch is the most likely to
    fail because it is the largest, and at the end.

    Raises:
        BDPOError: In every rank, if the work of any rank raised one.
    """
    for part in (islice(work, 1), work):
        error = None
        try:
            yield from part
        except BDPOError as raised:
            error = raised
        for rank, message in enumerate(gathered(error and str(error))):
            if message:
                raise error or BDPOError(f"Rank {rank} of this run could not go on. {message}")
