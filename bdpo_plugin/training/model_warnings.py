"""Says in words what the probe of a model found. The scorer prints it at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.model.padding import Padding
from bdpo_plugin.model.row_probe import SharedPrefixSupport
from bdpo_plugin.training.score_columns import longest


def layout_in_words(rows: SharedPrefixSupport) -> str:
    """Describes for the user how a model's batches are arranged."""
    if rows.shared:
        return "without padding; what sequences have in common at their beginning runs once"
    return f"padded, as the host's: {rows.why}"


def padding_warnings(padding: Padding) -> list[str]:
    """Returns a warning about a model whose logits depend on the padding of a batch."""
    if not padding.right.beyond_rounding:
        return []
    return [
        "What this model says of a sequence depends on the padding of its batch: padded, a token's "
        f"log-probability changes by up to {padding.right.nats:.2g} nats, which is more than "
        "rounding. Scored before training, the reference sees each pair in another batch than the "
        "policy does, and differs from it for that alone: set `bdpo_precompute: false`, which "
        "scores each pair in the batch that it is trained in."
    ]


def length_warnings(pairs: Sequence[Pair], limit: int | None) -> list[str]:
    """Returns a warning about pairs that are longer than a model's `rotary_limit`."""
    longer = int((longest(pairs) > limit).sum()) if limit else 0
    if not longer:
        return []
    return [
        f"{longer} of {len(pairs)} training pairs have more than {limit} tokens. Beyond that this "
        "model's rotary embedding depends on what else is in the batch, so that such a pair is "
        f"scored differently from how it is trained. Shorten the sequences to {limit} tokens."
    ]
