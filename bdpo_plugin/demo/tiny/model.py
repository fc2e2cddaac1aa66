"""Builds a tokenizer and causal language models that are small enough to be made in a test."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bdpo_plugin.demo.tiny.conversations import corpus

BOS, PAD, START, END = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, vocab_size: int = 1024, bos: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a ChatML template and ``<|im_end|>`` as its EOS token.

    Args:
        vocab_size: upper bound of the vocabulary. All 256 bytes are in it, so that any text can be
            tokenized.
        bos: whether to add a ``<|bos|>`` token. As with Llama's tokenizers, both the tokenizer,
            when it adds special tokens, and the chat template put it first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END] + [BOS] * bos
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = [f"{role}\n" for role in ("system", "user", "assistant")]
    tokenizer.train_from_iterator(corpus() + roles * 100, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=BOS if bos else None,
        additional_special_tokens=[START],
        chat_template=("{{ bos_token }}" if bos else "") + CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    config: type[PretrainedConfig] = Qwen2Config,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """Builds a float32 causal language model with random weights that depend on `seed` alone.

    Args:
        tokenizer: provides the size of the vocabulary and the special tokens.
        config: any decoder's configuration class (``LlamaConfig``, ``Gemma2Config``, ...).
        hidden_size, layers, heads: the size of the model. It has `heads` key and value heads too.
        seed: of the weights.
        options: further fields of the configuration, such as ``tie_word_embeddings=False``.
    """
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(**(fields | options)), dtype=torch.float32)
