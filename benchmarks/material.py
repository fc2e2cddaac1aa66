"""A model with random weights, a tokenizer of numbered words and preference pairs of them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks.setting import Setting

PAD, END = "<pad>", "<end>"
#: Words that every prompt begins and ends with, so that there is a null prompt.
_FRAME = 3


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: ``w2`` is token 2."""
    words = [PAD, END, *(f"w{i}" for i in range(2, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def build_pairs(setting: Setting) -> list[dict[str, str]]:
    """Random words; the end of sequence that TRL adds counts as a token of the response."""
    draw = random.Random(setting.seed)
    first = 2 + 2 * _FRAME
    front = [f"w{i}" for i in range(2, 2 + _FRAME)]
    back = [f"w{i}" for i in range(2 + _FRAME, first)]

    def words(count: int) -> list[str]:
        return [f"w{draw.randrange(first, setting.vocabulary)}" for _ in range(count)]

    def response() -> str:
        length = round(draw.lognormvariate(math.log(setting.response), setting.sigma))
        length = min(max(length, setting.shortest), setting.longest)
        return "".join(f" {word}" for word in words(length - 1))

    return [
        {
            "prompt": " ".join(front + words(setting.prompt - 2 * _FRAME) + back),
            "chosen": response(),
            "rejected": response(),
        }
        for _ in range(setting.pairs)
    ]


def build_model(setting: Setting) -> Any:
    """A Qwen2 model on the setting's device with random weights that depend on the seed alone."""
    config = Qwen2Config(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        tie_word_embeddings=setting.tied,
        max_position_embeddings=setting.prompt + setting.longest + 1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, setting.dtype),
            attn_implementation=setting.attention,
        )


def write(setting: Setting, folder: Path) -> None:
    """The pairs and, where it has to be on disk, the model with its tokenizer."""
    (folder / "pairs.json").write_text(json.dumps(build_pairs(setting)))
    if setting.on_disk:
        build_model(setting).save_pretrained(folder)


def count_tokens(folder: Path) -> int:
    """Tokens of all sequences of an epoch, without padding, each response with its end."""
    sides = [
        (pair["prompt"], pair[side])
        for pair in json.loads((folder / "pairs.json").read_text())
        for side in ("chosen", "rejected")
    ]
    return sum(len(prompt.split()) + len(response.split()) + 1 for prompt, response in sides)


def load_pairs(folder: Path) -> Dataset:
    return Dataset.from_list(json.loads((folder / "pairs.json").read_text()))


def load_model(setting: Setting, folder: Path) -> Any:
    """The model to train, on the setting's device."""
    if not setting.on_disk:
        return build_model(setting)
    dtype = getattr(torch, setting.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=setting.attention,
        device_map=setting.device,
        **({"quantization_config": quantization} if setting.adapter == "qlora" else {}),
    )
