"""Pairs for which a model has no positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.settings import BDPOError


def check_room(
    pairs: Sequence[Pair], rows: Iterable[int] | None, null: int, limit: int | None
) -> None:
    """Refuse pairs for which the model has no room.

    Args:
        pairs: after truncation.
        rows: what to call them; None where that is not known.
        null: tokens of the null prompt.
        limit: the model's `position_limit`, of its :class:`~bdpo_plugin.model.traits.Traits`.

    Raises:
        BDPOError: a prompt or the null prompt is too long together with a response.
    """
    if limit is None:
        return
    for what, longest, remedy in (
        (
            "prompt and response",
            [max(len(s.prompt_ids) + len(s.completion_ids) for s in pair) for pair in pairs],
            "Set the host's sequence length (`sequence_len`, `cutoff_len`, `max_length`) to "
            f"{limit} or less",
        ),
        (
            f"the null prompt ({null} tokens) and a response",
            [null + max(len(s.completion_ids) for s in pair) for pair in pairs],
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
