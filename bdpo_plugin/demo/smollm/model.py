"""Converts SmolLM2-135M-Instruct from a GGUF file to a folder that every host loads.

transformers reads GGUF too, but not this file in all releases that we support: the tokenizer that
it creates splits numbers, and the blank lines before them, differently than in the model's
training; some of its releases take the beginning of a turn for the end of the text; and 5.24 cannot
save the model that it has read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bdpo_plugin.settings import BDPOError

#: Names of a Llama's tensors in GGUF -> names in transformers' model.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's type of a control token, which stands for no text


def write_model(gguf: Path, directory: Path) -> PreTrainedTokenizerFast:
    """Writes weights (float32, safetensors), configuration and tokenizer. Returns the tokenizer.

    Raises:
        BDPOError: the file does not have the tensors of a Llama, or has another tokenizer.
    """
    reader = GGUFReader(gguf)
    told = {name: field.contents() for name, field in reader.fields.items()}
    model = LlamaForCausalLM(_config(told))
    state = _weights(reader, model.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is tied to the embedding
        raise BDPOError(f"{gguf.name} lacks {missing} or has more than a Llama: {unexpected}")
    model.save_pretrained(directory)
    tokenizer = _tokenizer(told)
    tokenizer.save_pretrained(directory)
    return tokenizer


def _config(told: Mapping[str, Any]) -> LlamaConfig:
    heads = told["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=told["llama.vocab_size"],
        hidden_size=told["llama.embedding_length"],
        intermediate_size=told["llama.feed_forward_length"],
        num_hidden_layers=told["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=told["llama.attention.head_count_kv"],
        max_position_embeddings=told["llama.context_length"],
        # the file stores it as float32
        rms_norm_eps=float(f"{told['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=told["llama.rope.freq_base"],
        tie_word_embeddings=True,
        bos_token_id=told["tokenizer.ggml.bos_token_id"],
        eos_token_id=told["tokenizer.ggml.eos_token_id"],
        pad_token_id=told["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Returns the state dict for transformers, without the tied head."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        *place, name, _ = tensor.name.split(".")  # blk.7.attn_q.weight or output_norm.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in heads:
            # GGUF interleaves the two halves of a rotary embedding; transformers concatenates them.
            halves = weight.view(heads[name], -1, 2, weight.shape[-1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        layer = f"model.layers.{place[1]}." if place else ""
        state[f"{layer}{_NAMES[name]}.weight"] = weight
    return state


def _tokenizer(told: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens = told["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]]
    if told["tokenizer.ggml.pre"] != "smollm":
        raise BDPOError(f"a tokenizer of kind {told['tokenizer.ggml.pre']}, not smollm")
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = told["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    bos, eos, pad, unk = (
        tokens[told[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("bos", "eos", "padding", "unknown")
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        additional_special_tokens=[bos, eos],
        chat_template=told["tokenizer.chat_template"],
        model_max_length=told["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
