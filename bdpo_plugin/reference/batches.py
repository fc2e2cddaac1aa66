"""Divides score requests into batches, by a budget of tokens. The reference pass calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bdpo_plugin.model.traits import unwrapped
from bdpo_plugin.reference.distributed import gathered
from bdpo_plugin.reference.scoring import ScoreRequest

#: The default number of tokens in a scoring batch. On a CPU larger batches are slower, because the
#: activations of a layer no longer fit into the processor's cache.
SCORE_TOKENS = 1024

#: The smallest and the largest default on a GPU. Batches of these sizes keep a GPU busy.
SCORE_TOKENS_ON_GPU = (4096, 16384)

#: The number of values that a layer computes for each token and each entry of its hidden state. It
#: counts the values that a layer keeps for a backward pass (Korthikanti et al., arXiv 2205.05198,
#: section 4.1: 34 bytes, 2 for each value), which is more than a forward pass without gradient
#: holds at once.
STATES = 17


def budgeted_batches(
    requests: Sequence[ScoreRequest], token_budget: int, *, shared: bool = False
) -> list[list[int]]:
    """Groups `requests` into batches of similar length, the longest first.

    A batch has at most `token_budget` tokens, or a single group if that is larger. A group is two
    successive requests with the same prompt, such as those of a preference pair, or a request that
    has no such partner. A group stays in one batch, because its common prompt may be run once.

    Args:
        shared: whether batches run packed, with a common prefix once. If True, the tokens of the
            packed row count, else those of the padded batch.

    Returns:
        Batches of indices into `requests`.
    """
    groups: list[list[int]] = []
    of_one: dict[bytes, list[int]] = {}  # groups that still have one request, by prompt
    for index, request in enumerate(requests):
        prompt = request.prompt_ids.tobytes()
        group = of_one.pop(prompt, None)
        if group is None:
            group = of_one[prompt] = []
            groups.append(group)
        group.append(index)

    def size(group: list[int]) -> tuple[int, int, int]:
        """Returns the tokens of the longest row, the number of rows, and the number of tokens with
        the common prompt counted once."""
        of_group = [requests[i] for i in group]
        nulls = [r.null_prompt_ids for r in of_group if r.null_prompt_ids is not None]
        rows = sum(request.rows for request in of_group)
        responses = sum(request.rows * len(request.completion_ids) for request in of_group)
        beginnings = len(of_group[0].prompt_ids) + max(map(len, nulls), default=0)
        return max(request.length for request in of_group), rows, beginnings + responses

    batches: list[list[int]] = []
    width, rows, tokens = 0, 0, 0  # sizes of the last batch
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
    """Returns the default number of tokens in a scoring batch, the same in every rank. On a GPU it
    is the number that takes a quarter of the free memory, within :data:`SCORE_TOKENS_ON_GPU`."""
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
