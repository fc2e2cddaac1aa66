"""A configuration as it would train, looked at without the weights of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.user_rows import Source
from bdpo_plugin.settings import BDPOSettings


@dataclass(frozen=True)
class Plan:
    """What decides the memory and the time that a training takes.

    Attributes:
        model: name or folder.
        bytes_per_weight: of the frozen base, or of the model where all is trained.
        trained_bytes: of a trained weight.
        computed_bytes: of an activation.
        rank: of the LoRA adapter; 0 where the whole model is trained; None where how much is
            trained cannot be told.
        targets: names of the modules with an adapter; None for all linear ones.
        rows: pairs of one step of one device.
        max_length: tokens of a pair's longer sequence.
        checkpointing: whether activations are computed again in the backward pass.
        eight_bit_optimizer: whether the optimizer keeps a byte, and not four, for each number.
        pass_tokens: of one batch of the scoring pass; None: as the device's free memory allows.
        attention: the attention implementation asked for; None where transformers chooses it.
    """

    model: str
    bytes_per_weight: float
    trained_bytes: float
    computed_bytes: int
    rank: int | None
    targets: Sequence[str] | None
    rows: int
    max_length: int
    checkpointing: bool
    eight_bit_optimizer: bool
    pass_tokens: int | None
    attention: str | None = None


@dataclass(frozen=True)
class Inspected:
    """The training data of a configuration, as the host tokenises it.

    Attributes:
        settings: of B-DPO.
        tokenizer: of the run.
        template: the chat template's name in the configuration, where the host writes the prompts
            by one of its own; None where the tokenizer's is used.
        pairs: B pairs after truncation.
        lengths: (B,) response tokens (chosen, rejected) before truncation.
        prompt_boundary_mismatch: positions whose prompt's tokens change when a response follows;
            None where the host tokenises the two apart.
        sources: the user's datasets.
        rendered: of a source, the text that the model is to read of each row.
        cut: pairs of which a part is cut off.
        left_out: rows that are left out as they are longer than the sequence length.
        length_key: the host's name of the sequence length.
        plan: what decides the memory.
        prepared: where the host keeps the pairs as it tokenised them in an earlier run, if it reads
            these and no other data.
    """

    settings: BDPOSettings
    tokenizer: Any
    template: str | None
    pairs: Sequence[Pair]
    lengths: Sequence[tuple[int, int]]
    prompt_boundary_mismatch: Sequence[int] | None
    sources: Sequence[Source]
    rendered: Callable[[Source], Iterable[str]]
    cut: int
    left_out: int
    length_key: str
    plan: Plan
    prepared: str | None = None
