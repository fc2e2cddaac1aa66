"""Checks that all pairs fit into the position limit of a model. The scorer calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bdpo_plugin.data.pairs import Pair, first_rows
from bdpo_plugin.settings import BDPOError


def check_room(
    pairs: Sequence[Pair], rows: Iterable[int] | None, null: int, limit: int | None
) -> None:
    """Refuses pairs that are longer than the model's position limit.

    Args:
        rows: the row numbers of the pairs for the message; None if they are unknown.
        limit: the model's `position_limit`, of its :class:`~bdpo_plugin.model.traits.Traits`; None
            if it has no limit.

    Raises:
        BDPOError: A response is too long together with its prompt or with the null prompt.
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
            where = "of this batch" if rows is None else f"(rows {first_rows(found)})"
            raise BDPOError(
                f"{len(found)} of {len(pairs)} pairs {where}: {what} have up to {max(longest)} "
                f"tokens, and this model has positions for {limit}. {remedy}."
            )
