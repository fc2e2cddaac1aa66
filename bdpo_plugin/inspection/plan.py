"""What determines the memory and the time of a run. It imports nothing heavy, as
`bdpo recipes list` uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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
        optimizer_bytes: bytes that the optimizer keeps for each trained weight.
        pass_tokens: tokens of one batch of the reference pass; None if that depends on the device's
            free memory.
        batch: pairs of an optimizer step of one process.
        sharded: whether the processes share weights, gradients and optimizer (ZeRO-3, FSDP).
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
    optimizer_bytes: float
    pass_tokens: int | None
    batch: int = 1
    sharded: bool = False
    attention: str | None = None


#: Bits of a quantised weight -> its bytes, with the scales of its block.
QUANTISED_BYTES = {4: 0.56, 8: 1.06}


def optimizer_bytes(optimizer: object, trained_bytes: int, *, deepspeed: bool) -> float:
    """Returns the bytes that an optimizer keeps for each trained weight.

    Args:
        optimizer: the name of the optimizer, by which those of 8 bits are known.
        trained_bytes: bytes of a trained weight.
        deepspeed: whether DeepSpeed trains, which keeps the weights in float32 beside those that it
            trains in 16 bits.
    """
    if "8bit" in str(optimizer):
        return 2
    return 12 if deepspeed and trained_bytes == 2 else 2 * trained_bytes


class HostKeys(NamedTuple):
    """The keys of a host, for lines that can be copied into a configuration.

    Attributes:
        length: the key of the sequence length.
        rows: the key of the pairs per step and device.
        accumulation: the key of the number of such steps in a step of the optimizer.
        checkpointing: the lines that turn gradient checkpointing on.
        quantised: the lines that load the weights in 4 bits.
        own_template: the line that asks for the chat template of the tokenizer.
        new_tokens: the lines that add tokens; ``{}`` stands for their list.
        no_thinking: the lines by which the prompt gets the empty thought of a model that thinks.
        resized: the line that gives the model an embedding for each token of the tokenizer.
    """

    length: str
    rows: str
    accumulation: str
    checkpointing: str
    quantised: str
    own_template: str
    new_tokens: str
    no_thinking: str
    resized: str = ""
