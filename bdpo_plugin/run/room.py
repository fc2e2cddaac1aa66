"""How long a sequence a model has positions for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from bdpo_plugin.model.traits import text_config
from bdpo_plugin.pairs import Pair
from bdpo_plugin.settings import BDPOError


def position_limit(model: Any) -> int | None:
    """Tokens of the longest sequence that a model with a table of positions can read (GPT-2, OPT,
    GPT-J and others); None where there is no such table.

    The table is told from the others by its length, which is what the configuration names.
    """
    length = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(length, int) or hasattr(text_config(model), "rope_parameters"):
        return None
    inputs = model.get_input_embeddings()
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's begins with two more rows
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not inputs
    ]
    tables += [len(buffer) for buffer in model.buffers() if buffer.dim() == 2]
    return length if length in tables else None


def check_room(
    pairs: Sequence[Pair], rows: Iterable[int] | None, null: int, limit: int | None
) -> None:
    """Refuse pairs for which the model has no room.

    Args:
        pairs: after truncation.
        rows: what to call them; None where that is not known.
        null: tokens of the null prompt.
        limit: the model's :func:`position_limit`.

    Raises:
        BDPOError: a prompt or the null prompt is too long together with a response.
    """
    if limit is None:
        return
    for what, longest, remedy in (
        (
            "prompt and response",
            [max(len(s.prompt) + len(s.response) for s in pair) for pair in pairs],
            "Set the host's sequence length (`sequence_len`, `cutoff_len`, `max_length`) to "
            f"{limit} or less",
        ),
        (
            f"the null prompt ({null} tokens) and a response",
            [null + max(len(s.response) for s in pair) for pair in pairs],
            "Set `bdpo_null_prompt` to a shorter one, or shorten the responses by the host's "
            "sequence length (`sequence_len`, `cutoff_len`, `max_length`)",
        ),
    ):
        names = rows if rows is not None else range(len(pairs))
        found = [row for row, length in zip(names, longest, strict=True) if length > limit]
        if found:
            where = "of this batch" if rows is None else f"(rows {_few(found)})"
            raise BDPOError(
                f"{len(found)} of {len(pairs)} pairs {where}: {what} have up to {max(longest)} "
                f"tokens, and this model has positions for {limit}. {remedy}."
            )


def _few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
