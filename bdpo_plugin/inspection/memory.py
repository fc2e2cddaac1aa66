"""How much memory a training takes, estimated from its configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

from bdpo_plugin.inspection.configuration import Plan
from bdpo_plugin.reference.scoring import SCORE_TOKENS_ON_GPU, STATES

_GIB = 2**30
#: The most logits that are held at once (`bdpo_plugin/model/head.py`).
_LOGITS = 128 * 2**20


class Memory(NamedTuple):
    """Of one device, in GiB."""

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    scoring: float

    @property
    def training(self) -> float:
        """While it trains: all but the scoring pass."""
        return sum(self) - self.scoring

    @property
    def peak(self) -> float:
        """The greater one of the pass, which needs the weights too, and of the training."""
        return max(self.training, self.weights + self.adapter + self.scoring)


def weightless(plan: Plan) -> Any:
    """The model of a run, of its shape and without its weights.

    Raises:
        OSError, ValueError: the model's configuration cannot be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(plan.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if plan.attention:  # whose package may not be here
        model.config._attn_implementation = plan.attention
    return model


def estimate(model: Any, plan: Plan) -> Memory:
    """The memory of a run on one device, from the model's shape alone.

    Args:
        model: :func:`weightless`.
    """
    config = model.config
    weights, total = _weights(model, plan)
    trained = total if plan.rank == 0 else _adapter(model, plan)
    text = config.get_text_config()
    tokens = 2 * plan.rows * plan.max_length
    states = tokens * text.hidden_size * plan.computed_bytes
    layers = text.num_hidden_layers
    kept = states * (layers + STATES if plan.checkpointing else layers * STATES)
    scored = plan.pass_tokens or SCORE_TOKENS_ON_GPU[0]  # more only where there is memory for it
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
    """Bytes of the base's weights, and how many there are. Quantisation leaves embeddings and the
    output layer in 16 bits."""
    quantised = plan.bytes_per_weight not in (2, 4)
    outside = 0
    if quantised:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outside = sum({id(e.weight): e.weight.numel() for e in ends if e is not None}.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (total - outside) * plan.bytes_per_weight + outside * 2, total


def _adapter(model: Any, plan: Plan) -> int:
    """Weights of a LoRA adapter."""
    from torch import nn

    head = model.get_output_embeddings()
    return sum(
        (plan.rank or 0) * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (plan.targets is None or name.rpartition(".")[2] in plan.targets)
    )
