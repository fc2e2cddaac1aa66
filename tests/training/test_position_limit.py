"""Sequences that a model has no positions for are refused, with rows and remedy."""

import numpy as np
import pytest
import torch
from small_models import small_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.model.traits import Traits
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.position_limit import check_room

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "is_decoder": True,
    "rotary_dim": 8,
    "attention_types": [[["global"], 1]],
}
TABLES = ["gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "gptj", "codegen", "openai-gpt"]
NONE = ["llama", "bloom", "xglm", "mamba", "gpt_neox"]


def tiny(kind, **options):
    config = CONFIG_MAPPING[kind]()
    for name, value in (TINY | options).items():
        if hasattr(config, name):
            setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def position_limit(model):
    return Traits.of(model).position_limit


@pytest.mark.parametrize("kind", TABLES)
def test_the_limit_is_where_the_model_stops(kind):
    model = tiny(kind)
    limit = position_limit(model)
    assert limit == 24
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("kind", NONE)
def test_models_without_a_limit(kind):
    model = tiny(kind)
    assert position_limit(model) is None
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5))


def test_under_an_adapter(tokenizer):
    from peft import LoraConfig, get_peft_model

    assert position_limit(get_peft_model(tiny("opt"), LoraConfig(target_modules=["q_proj"]))) == 24
    assert position_limit(small_model(tokenizer)) is None


def test_in_the_wrapper_of_distributed_training():
    assert position_limit(torch.nn.DataParallel(tiny("gpt2"))) == 24


def pair(prompt, chosen, rejected):
    ids = [np.arange(n) for n in (prompt, chosen, rejected)]
    return Pair(Side(ids[0], ids[1]), Side(ids[0], ids[2]))


def test_rows_lengths_limit_and_remedy_are_named():
    fitting = [pair(4, 6, 2), pair(1, 2, 9)]
    check_room(fitting, [0, 1], 1, 10)
    check_room([*fitting, pair(99, 99, 99)], [0, 1, 2], 99, None)
    with pytest.raises(BDPOError) as refusal:
        check_room([*fitting, pair(4, 7, 2), pair(4, 2, 8)], [0, 3, 5, 8], 1, 10)
    assert str(refusal.value) == (
        "2 of 4 pairs (rows 5, 8): prompt and response have up to 12 tokens, and this model has "
        "positions for 10. Set the host's sequence length (`sequence_len`, `cutoff_len`, "
        "`max_length`) to 10 or less."
    )
    with pytest.raises(
        BDPOError, match=r"1 of 2 pairs of this batch: the null prompt \(2 tokens\)"
    ):
        check_room(fitting, None, 2, 10)
    with pytest.raises(BDPOError, match=r"rows 0, 1, 2, 3, 4, \.\.\.\).*bdpo_null_p"):
        check_room(fitting[1:] * 12, range(12), 2, 10)
