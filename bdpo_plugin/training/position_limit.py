"""Checks that all pairs fit into the position limit of a model. The scorer calls it."""

from __future__ import annotations

from collections.abc import Sequence

from bdpo_plugin.data.pairs import Pair, first_rows
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.score_columns import longest


def check_room(
    pairs: Sequence[Pair], rows: Sequence[int] | None, null: int, limit: int | None
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
    responses = [max(len(side.completion_ids) for side in pair) for pair in pairs]
    for what, lengths, remedy in (
        (
            "prompt and response",
            longest(pairs).tolist(),
            "Set the host's sequence length (`sequence_len`, `cutoff_len`, `max_length`) to "
            f"{limit} or less",
        ),
        (
            f"the null prompt ({null} tokens) and a response",
            [null + length for length in responses],
            "Set `bdpo_null_prompt` to a shorter one, or shorten the responses by the host's "
            "sequence length (`sequence_len`, `cutoff_len`, `max_length`)",
        ),
    ):
        found = [place for place, length in enumerate(lengths) if length > limit]
        if found:
            where = "of this batch" if rows is None else f"(rows {first_rows(found, rows)})"
            raise BDPOError(
                f"{len(found)} of {len(pairs)} pairs {where}: {what} have up to {max(lengths)} "
                f"tokens, and this model has positions for {limit}. {remedy}."
            )
