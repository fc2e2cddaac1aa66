"""What the ranks of a distributed run tell each other of the reference pass."""

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
    """Whether this is the first of the ranks that share its machine, and so perhaps its disk."""
    return not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=this_rank()) == 0


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def maximum(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Of each element of an array of floats, the greatest that a rank has."""
    if world_size() == 1:
        return values
    shared = torch.from_numpy(values).to(device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.cpu().numpy()


def share(batches: Sequence[list[int]], tokens: np.ndarray) -> list[list[int]]:
    """This rank's part of the batches, which has about as many tokens as any other's.

    Args:
        batches: indices; the longest sequences first, and so in the part.
        tokens: of each index.
    """
    mine, loads = [], [0] * world_size()
    for batch in batches:
        rank = loads.index(min(loads))
        loads[rank] += int(tokens[batch].sum())
        if rank == this_rank():
            mine.append(batch)
    return mine


def raised_by_all(work: Iterator[Any]) -> Iterator[Any]:
    """Passes on what a rank's share of the work yields; where one rank cannot go on, all stop.

    They agree twice: after the first piece, which is the hardest, and at the end.

    Raises:
        BDPOError: in each rank, where the work raised one in any of them.
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
