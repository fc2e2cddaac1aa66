"""The models and the data of the rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs

Pair = dict[str, Any]

#: The size of every model.
SIZE = {"hidden_size": 64, "layers": 2}
#: Their configuration classes, and fields beside the size.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2-bfloat16": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}


def write(folder: Path) -> None:
    """``models/NAME``, ``data/FORMAT.jsonl``, an evaluation set of each, LLaMA-Factory's list."""
    for name, (config, options) in MODELS.items():
        tokenizer = build_tokenizer(bos=name == "llama")
        model = build_model(tokenizer, config=getattr(transformers, config), **SIZE, **options)
        with torch.no_grad():  # a mutual information as large as a trained model's
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        if name.endswith("bfloat16"):
            model.bfloat16()
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    (folder / "data").mkdir()
    entries = {}
    for split, count in (("train", 24), ("eval", 8)):
        pairs = preference_pairs(count, split=split)
        for name, form in FORMATS.items():
            file = f"{name}.jsonl" if split == "train" else f"{name}.{split}.jsonl"
            rows = [form(number, pair) for number, pair in enumerate(pairs)]
            lines = [json.dumps(row) for row in rows if row is not None]
            (folder / "data" / file).write_text("".join(f"{line}\n" for line in lines))
            if name in _RANKING:
                key = name if split == "train" else f"{name}_{split}"
                entries[key] = {"file_name": file, "ranking": True, **_RANKING[name]}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries))
    # what the Spectrum plugin would fetch for a model of this name
    (folder / "model_snr_results").mkdir()
    layers = [f"model.layers.{i}.mlp.down_proj" for i in range(SIZE["layers"])]
    ratios = {name: {"type": "mlp.down_proj", "snr": i} for i, name in enumerate(layers)}
    (folder / "model_snr_results" / "snr_results_tiny.json").write_text(json.dumps(ratios))


def _query(pair: Pair) -> str:
    return pair["messages"][0]["content"]


def _sides(pair: Pair) -> dict[str, str]:
    return {side: pair[side]["content"] for side in ("chosen", "rejected")}


def _system(number: int) -> str:
    return ("You are kind.", "Answer in one sentence.")[number % 2]


def _conversations(number: int, pair: Pair) -> Pair:
    return {side: [*pair["messages"], pair[side]] for side in ("chosen", "rejected")}


def _turns(number: int, pair: Pair) -> Pair:
    before = [
        {"role": "system", "content": _system(number)},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello, how can I help?"},
    ]
    return {**pair, "messages": [*before[number % 2 :], *pair["messages"]]}


def _renamed(number: int, pair: Pair) -> Pair:
    names = {"user": "human", "assistant": "gpt"}

    def turn(message: dict[str, str]) -> dict[str, str]:
        return {"from": names[message["role"]], "value": message["content"]}

    return {
        "talk": [turn(m) for m in pair["messages"]],
        "good": turn(pair["chosen"]),
        "bad": turn(pair["rejected"]),
    }


def _few(number: int, pair: Pair) -> Pair | None:
    """Six short pairs, for what is slow."""

    def end(message: dict[str, str]) -> dict[str, str]:
        return {**message, "content": " ".join(message["content"].split()[-3:])}

    short = {side: end(pair[side]) for side in ("chosen", "rejected")}
    return {"messages": [end(pair["messages"][0])], **short} if number < 6 else None


def _fields(number: int, pair: Pair) -> Pair:
    return {"talk": pair["messages"], "good": pair["chosen"], "bad": pair["rejected"]}


def _nectar(number: int, pair: Pair) -> Pair:
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate(_sides(pair).values())]
    return {"prompt": _query(pair), "answers": answers}


def _text(number: int, pair: Pair) -> Pair:
    prompt = f"<|im_start|>user\n{_query(pair)}<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": prompt, **{k: f"{v}<|im_end|>" for k, v in _sides(pair).items()}}


def _ultra(number: int, pair: Pair) -> Pair:
    return {"prompt": _query(pair), **_conversations(number, pair)}


#: From the number of a row and its pair in messages to the row that a host reads, if any.
FORMATS: dict[str, Callable[[int, Pair], Pair | None]] = {
    "messages": lambda number, pair: pair,
    "turns": _turns,
    "few": _few,
    "renamed": _renamed,
    "fields": _fields,
    "conversations": _conversations,
    "ultra": _ultra,
    "nectar": _nectar,
    "text": _text,
    "alpaca": lambda number, pair: {"instruction": _query(pair), "input": "", **_sides(pair)},
    **{
        key: lambda number, pair, key=key: {
            "system": _system(number),
            key: _query(pair),
            **_sides(pair),
        }
        for key in ("question", "input", "prompt")
    },
}

_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
_TAGS |= {"assistant_tag": "assistant", "system_tag": "system"}
_MESSAGES = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
#: How LLaMA-Factory reads those formats that it can.
_RANKING: dict[str, dict[str, Any]] = {
    "messages": {"formatting": "sharegpt", "columns": _MESSAGES, "tags": _TAGS},
    "few": {"formatting": "sharegpt", "columns": _MESSAGES, "tags": _TAGS},
    "turns": {"formatting": "sharegpt", "columns": _MESSAGES, "tags": _TAGS},
    "renamed": {
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
    },
    "alpaca": {
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "chosen": "chosen",
            "rejected": "rejected",
        }
    },
    "question": {
        "columns": {
            "prompt": "question",
            "system": "system",
            "chosen": "chosen",
            "rejected": "rejected",
        }
    },
}

if __name__ == "__main__":
    write(Path(sys.argv[1]))
