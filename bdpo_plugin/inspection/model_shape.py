"""The sizes of a model that decide the memory and the time of a run. They are counted from a model
without weights (`bdpo doctor`), or read from `shapes.json` for the models of the package's recipes
(`bdpo recipes list`, which loads no library of models for them)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model.

    Attributes:
        layers: number of layers.
        hidden: entries of a hidden state.
        heads: entries of all attention heads of a layer.
        inner: entries between the two halves of a layer's MLP, for one token.
        vocabulary: entries that the output layer projects to.
        weights: all weights.
        ends: weights of the embedding and the output layer, once if they are tied.
        head: weights of the output layer.
        body: weights of the layers that each token is multiplied by.
        adapted: for the linear layers of one name, the sum of their input and output entries: a
            LoRA adapter has as many weights for each of its ranks.
    """

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    weights: int
    ends: int
    head: int
    body: float
    adapted: Mapping[str, int]

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Counts the sizes of a model of transformers, which may be without weights."""
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        ends = {id(e.weight): e.weight.numel() for e in (embedding, head) if e is not None}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads * size,
            inner=_inner(config),
            vocabulary=config.vocab_size,
            weights=sum(parameter.numel() for parameter in model.parameters()),
            ends=sum(ends.values()),
            head=head.weight.numel() if head is not None else 0,
            body=sum(n for parameter, n in _active(model, config) if id(parameter) not in ends),
            adapted=_adapted(model, head),
        )

    def adapter(self, rank: int, targets: Sequence[str] | None) -> int:
        """Returns the number of weights of a LoRA adapter; `targets` None is all linear layers."""
        names = self.adapted.keys() if targets is None else self.adapted.keys() & set(targets)
        return rank * sum(self.adapted[name] for name in names)


def known_shapes() -> dict[str, Shape]:
    """Returns the shapes of the models of the package's recipes, by the name in the recipe."""
    text = Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
    return {name: Shape(**sizes) for name, sizes in json.loads(text).items()}


def _inner(config: Any) -> int:
    if chosen := getattr(config, "num_experts_per_tok", None):
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(chosen * width)
    names = ("intermediate_size", "n_inner", "ffn_dim")
    found = next((n for name in names if (n := getattr(config, name, None))), None)
    return int(found or 4 * config.hidden_size)


def _active(model: Any, config: Any) -> Iterator[tuple[Any, float]]:
    """Yields each weight tensor and how many of its entries a token is multiplied by.

    In a mixture of experts, these are the entries of the experts chosen for a token."""
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 1)
    for name, parameter in model.named_parameters():
        yield parameter, parameter.numel() * (chosen / experts if ".experts." in name else 1)


def _adapted(model: Any, head: Any) -> dict[str, int]:
    from torch import nn

    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            name = path.rpartition(".")[2]
            found[name] = found.get(name, 0) + module.in_features + module.out_features
    return found
