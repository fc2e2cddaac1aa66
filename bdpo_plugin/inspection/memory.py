"""Estimates the memory of a training run by formula, from the shape of its model.

`benchmarks/memory.py` compares the formula with measured peaks. What a layer keeps for its backward
pass is counted for a layer like Llama's: two norms, attention, and a gated MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.inspection.plan import Plan

GIB = 2**30
#: The most logits at once (`bdpo_plugin/model/head.py`), and the tokens of a scoring batch on a GPU
#: with little memory to spare (`bdpo_plugin/reference/batches.py`). Importing these would
#: import torch, which `bdpo recipes list` does without.
CHUNK_ELEMENTS, SCORE_TOKENS = 2**25, 4096
#: The most weights that DeepSpeed gathers at once under ZeRO-3 (`stage3_max_live_parameters`).
_GATHERED = 10**9


class Memory(NamedTuple):
    """Estimated memory of one device, in GiB."""

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    scoring: float

    @property
    def training(self) -> float:
        """Memory during training: everything but the reference pass."""
        return sum(self) - self.scoring

    @property
    def peak(self) -> float:
        """The larger one of training and the reference pass, which needs the weights too."""
        return max(self.training, self.weights + self.adapter + self.scoring)


def weightless(plan: Plan) -> Any:
    """Returns the model of a run with its shapes, but without its weights.

    Raises:
        OSError, ValueError: the model's configuration cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(plan.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if plan.attention:  # set afterwards, as its package may not be installed here
        model.config._attn_implementation = plan.attention
    return model


def estimate(shape: Shape, plan: Plan, processes: int = 1) -> Memory:
    """Estimates the memory of a run on each of its devices.

    Args:
        shape: the sizes of the model.
        plan: the properties of the run.
        processes: the number of devices that share weights, gradients and optimizer, if the run
            does so.
    """
    full = plan.rank == 0
    trained = shape.weights if full else shape.adapter(plan.rank or 0, plan.targets)
    weights = (shape.weights - shape.ends) * plan.bytes_per_weight
    # quantization leaves the embeddings and the output layer in 16 bits
    weights += shape.ends * max(plan.bytes_per_weight, 2)
    share = processes if plan.sharded else 1
    gathered = plan.bytes_per_weight * min(_GATHERED, shape.weights) if share > 1 else 0
    found = Memory(
        weights=weights / share + gathered,
        adapter=0 if full else trained * plan.trained_bytes / share,
        gradients=trained * plan.trained_bytes / share,
        optimizer=trained * plan.optimizer_bytes / share,
        activations=_activations(shape, plan, 2 * plan.rows * plan.max_length),
        scoring=_scoring(shape, plan, plan.pass_tokens or SCORE_TOKENS),
    )
    return Memory(*(size / GIB for size in found))


def _activations(shape: Shape, plan: Plan, tokens: int) -> float:
    """Returns the bytes of what the forward pass keeps, and of what the backward pass adds."""
    each, full, mixed = (
        plan.computed_bytes,
        plan.rank == 0,
        plan.trained_bytes > plan.computed_bytes,
    )
    layer = tokens * (
        2 * shape.hidden * 4  # the inputs of the norms, which compute in float32
        + each * 2 * shape.hidden * full  # what the trained weight of a norm is multiplied by
        # the inputs of the linear layers; PEFT casts that of each of them to the adapter's dtype
        + each * shape.hidden * (6 if mixed and not full else 3)
        + each * 4 * shape.heads  # queries, keys and values, and what attention makes of them
        + each * 4 * shape.inner  # of the MLP: gate, its activation, up, and their product
    )
    backward = tokens * each * (2 * shape.hidden + 3 * shape.inner)
    head = tokens * shape.hidden * (4 + 4 * each) + _logits(shape, tokens)
    if plan.checkpointing:
        kept = shape.layers * tokens * shape.hidden * each + max(head, layer + backward)
    else:
        kept = shape.layers * layer + max(head, backward)
    # autocast keeps copies of trained weights in another dtype until the backward pass
    return kept + (each * shape.weights if mixed and full else 0)


def _scoring(shape: Shape, plan: Plan, tokens: int) -> float:
    each = plan.computed_bytes
    layer = tokens * (8 * shape.hidden + each * (2 * shape.hidden + 3 * shape.inner))
    head = tokens * shape.hidden * (4 + 2 * each) + _logits(shape, tokens)
    return max(layer, head)


def _logits(shape: Shape, tokens: int) -> float:
    """Returns the bytes of the logits that exist at once: a chunk of them in float32, their
    exponentials, and the products of both."""
    return min(tokens * shape.vocabulary, CHUNK_ELEMENTS) * 3 * 4
