"""The sizes of the models of the recipes, and what is estimated of their memory and hours."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo_plugin.demo.tiny import build_model, build_tokenizer
from bdpo_plugin.inspection.model_shape import Shape, known_shapes

_SMOLLM = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
#: The published configurations.
CONFIGS = {
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "./bdpo-demo/real/model": _SMOLLM,
    "./bdpo-demo/tiny/model": None,  # made here
}
#: The weights of each, as their makers and the hub say.
WEIGHTS = {
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2-7B-Instruct": 7_615_616_512,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "./bdpo-demo/real/model": 134_515_008,
}


def counted(name: str) -> Shape:
    if (config := CONFIGS[name]) is None:
        return Shape.of(build_model(build_tokenizer()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()
    return Shape.of(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_the_recipes_are_those_of_their_configurations(name) -> None:
    """To write the file anew: `dataclasses.asdict(counted(name))` of each, by name, as JSON."""
    assert dataclasses.asdict(known_shapes()[name]) == dataclasses.asdict(counted(name))
    if name in WEIGHTS:
        assert known_shapes()[name].weights == WEIGHTS[name]
