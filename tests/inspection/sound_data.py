"""Sound data of a run, as a host's inspection reports it, for tests that change a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.hosts.llamafactory.plan import KEYS
from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.inspection.plan import Plan
from bdpo_plugin.settings import BDPOSettings


@cache
def tokenizer() -> Any:
    return build_tokenizer(bos=True)


def side_of(prompt: str, response: str) -> Side:
    texts = (prompt, response)
    ids = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts)
    return Side(*(np.asarray(of, dtype=np.int64) for of in ids))


def pair_of(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(side_of(prompt, chosen), side_of(prompt, rejected))


PROMPT = "<|bos|><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUERIES = [f"Can you tell me how to bake bread in {n} minutes?" for n in range(120)]
PAIRS = [(PROMPT.format(query), "No.<|im_end|>\n", "Yes.<|im_end|>\n") for query in QUERIES]
PLAN = Plan(
    model="Qwen/Qwen2-7B-Instruct",
    bytes_per_weight=2,
    trained_bytes=4,
    computed_bytes=2,
    rank=16,
    targets=None,
    rows=4,
    max_length=1024,
    checkpointing=False,
    optimizer_bytes=8,
    pass_tokens=None,
    batch=16,
)


def inspected(
    rows: list[tuple[str, str, str]] = PAIRS,
    source: Mapping[str, list[Any]] | None = None,
    **changes: Any,
) -> Inspected:
    """Sound data, with `changes`."""
    made = Dataset.from_dict(dict(source or {"prompt": QUERIES}))
    pairs = [pair_of(*row) for row in rows]
    sound = Inspected(
        settings=BDPOSettings(),
        tokenizer=tokenizer(),
        own_template=tokenizer().chat_template,
        pairs=pairs,
        names=None,
        first=pairs[:3],
        lengths=[(1, 1)] * len(pairs),
        prompt_boundary_mismatch=[],
        sources=[Source(made, made)],
        columns={"train": ["prompt", "label"], "eval": ["prompt", "label"]},
        rendered=lambda source: [str(row["prompt"]) for row in source.made],
        cut=0,
        left_out=0,
        uncut=lambda: 1311,
        keys=KEYS,
        plan=PLAN,
        resizes=True,
    )
    return replace(sound, **changes)
