"""What the hosts' inspections report about a configuration: its training data and its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bdpo_plugin.data.pairs import Pair
from bdpo_plugin.data.user_rows import Source
from bdpo_plugin.settings import BDPOSettings


@dataclass(frozen=True)
class Plan:
    """The properties of a training run that determine its memory and time.

    Attributes:
        model: name or folder of the model.
        bytes_per_weight: bytes of a weight of the frozen base model, or of the model itself if all
            its weights are trained.
        trained_bytes: bytes of a trained weight.
        computed_bytes: bytes of an activation.
        rank: rank of the LoRA adapter; 0 if the whole model is trained; None if the number of
            trained weights is not known.
        targets: names of the modules that have an adapter; None for all linear ones.
        rows: pairs per step and device.
        max_length: maximum number of tokens of a pair's longer sequence.
        checkpointing: whether activations are recomputed in the backward pass.
        eight_bit_optimizer: whether the optimizer stores each number in one byte instead of four.
        pass_tokens: tokens of one batch of the reference pass; None if that depends on the device's
            free memory.
        attention: the attention implementation in the configuration; None if transformers chooses.
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
        settings: the settings of B-DPO.
        tokenizer: the tokenizer of the run.
        template: the name of the host's own template in the configuration; None if the tokenizer's
            chat template is used.
        pairs: B pairs after truncation.
        lengths: (B,) response tokens (chosen, rejected) before truncation.
        prompt_boundary_mismatch: positions of the rows in which the tokens of the prompt change
            when a response follows; None if the host tokenises prompt and response separately.
        sources: the user's datasets.
        rendered: a function that returns the text of each row of a source that the model reads.
        cut: number of pairs that are truncated.
        left_out: number of rows that are dropped because they are longer than the sequence length.
        length_key: the host's name of the sequence length.
        plan: the properties that determine memory and time.
        prepared: the folder of pairs that the host tokenised in an earlier run, if it reads these
            and no other data.
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
