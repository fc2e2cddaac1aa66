"""Estimates the memory of a training run from its configuration, for `bdpo doctor`."""

from __future__ import annotations

from typing import Any, NamedTuple

from bdpo_plugin.inspection.configuration import Plan
from bdpo_plugin.reference.batches import SCORE_TOKENS_ON_GPU, STATES

_GIB = 2**30
#: The maximum size of the logits that exist at once, in bytes (`bdpo_plugin/model/head.py`).
_LOGITS = 128 * 2**20


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


def estimate(model: Any, plan: Plan) -> Memory:
    """Estimates the memory of a run on one device from the shapes of the model alone.

    Args:
        model: a model without weights, as :func:`weightless` returns it.
        plan: the properties of the run.
    """
    config = model.config
    weights, total = _weights(model, plan)
    trained = total if plan.rank == 0 else _adapter(model, plan)
    text = config.get_text_config()
    tokens = 2 * plan.rows * plan.max_length
    states = tokens * text.hidden_size * plan.computed_bytes
    layers = text.num_hidden_layers
    kept = states * (layers + STATES if plan.checkpointing else layers * STATES)
    scored = plan.pass_tokens or SCORE_TOKENS_ON_GPU[0]  # larger batches only if memory is free
    moments = 2 * trained * (1 if plan.eight_bit_optimizer else plan.trained_bytes)
    found = Memory(
        weights=weights,
        adapter=0 if plan.rank == 0 else trained * plan.trained_bytes,
        gradients=trained * plan.trained_bytes,
        optimizer=moments,
        activations=kept + 3 * _LOGITS,
        scoring=scored * text.hidden_size * plan.computed_bytes * STATES + 2 * _LOGITS,
    )
    return Memory(*(size / _GIB for size in found))


def _weights(model: Any, plan: Plan) -> tuple[float, int]:
    """Returns the bytes of the base model's weights, and their number.

    Quantization leaves the embeddings and the output layer in 16 bits."""
    quantised = plan.bytes_per_weight not in (2, 4)
    outside = 0
    if quantised:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outside = sum({id(e.weight): e.weight.numel() for e in ends if e is not None}.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (total - outside) * plan.bytes_per_weight + outside * 2, total


def _adapter(model: Any, plan: Plan) -> int:
    """Returns the number of weights of a LoRA adapter."""
    from torch import nn

    head = model.get_output_embeddings()
    return sum(
        (plan.rank or 0) * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (plan.targets is None or name.rpartition(".")[2] in plan.targets)
    )
