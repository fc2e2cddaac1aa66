"""What the tests of the reference pass share: small models, batches and jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.demo.tiny import build_model
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference.batches import budgeted_batches
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests

CPU = torch.device("cpu")
torch.set_num_threads(1)  # on models this small, threads only wait for each other

#: Name -> configuration class and fields: every way to get from hidden states to logits.
ARCHITECTURES = {
    "tied": (Qwen2Config, {}),
    "untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "soft-capped": (Gemma2Config, {"final_logit_softcapping": 0.5}),
    "logit_scale": (CohereConfig, {"logit_scale": 0.25}),
    "logits_scaling": (GraniteConfig, {"logits_scaling": 5.0, "tie_word_embeddings": False}),
    "moe": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
}


def small_model(tokenizer, architecture="tied", *, seed=0, scale=6.0, **options):
    """A model of hidden size 32 whose next-token distributions are far from uniform."""
    config, fields = ARCHITECTURES[architecture]
    model = build_model(
        tokenizer,
        config=config,
        **{"hidden_size": 32, "layers": 2, "heads": 2, "seed": seed, **fields, **options},
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


class OddLogits(Qwen2ForCausalLM):
    """Does something to its logits that no field of its configuration tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        ramp = torch.linspace(0, 1, outputs.logits.shape[-1])
        outputs.logits = outputs.logits * 1.7 + ramp
        return outputs


def recast(model, cls):
    model.__class__ = cls
    return model


def truth_model(model):
    """`model` as tests/truth.py wants one."""

    @torch.no_grad()
    def logits(ids):
        return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()

    return logits


def random_side(rng, vocabulary, prompt=(1, 9), response=(1, 9)):
    return Side(
        rng.integers(5, vocabulary, rng.integers(*prompt)),
        rng.integers(5, vocabulary, rng.integers(*response)),
    )


def random_pairs(n, *, seed=0, vocabulary=1000, prompt=(2, 9), response=(1, 9)):
    """`n` pairs, each with one prompt."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        chosen = random_side(rng, vocabulary, prompt, response)
        rejected = random_side(rng, vocabulary, prompt, response)
        pairs.append(Pair(chosen, Side(chosen.prompt_ids, rejected.completion_ids)))
    return pairs


class Score(NamedTuple):
    logps: float
    gain: float | None = None


def scores_of(model, jobs: list[ScoreRequest], *, budget=256, reader=None, batches=None):
    """The scores of `jobs`, in their order."""
    batches = batches or budgeted_batches(jobs, budget)
    found = {}
    with torch.no_grad():
        for batch, scores in score_requests(model, reader or ResponseReader(), jobs, batches, CPU):
            found |= {i: Score(*score) for i, score in zip(batch, scores.tolist(), strict=True)}
    return [found[i] for i in range(len(jobs))]


def sequences(position_ids) -> int:
    """How many sequences, of two tokens at least, are packed in it: as many as end.

    Those with a common beginning each have an end of their own; padding is a row of zeros.
    """
    following = torch.nn.functional.pad(position_ids, (0, 1))[:, 1:]
    return int(((position_ids > 0) & (following != position_ids + 1)).sum())


@contextmanager
def counted_rows(model) -> Iterator[list[int]]:
    """The number of sequences of each forward pass of `model`, packed or a row each."""
    rows: list[int] = []

    def count(_, args, kwargs):
        if (places := kwargs.get("position_ids")) is not None:
            rows.append(sequences(places))
        else:
            rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def stored(store) -> dict[bytes, tuple[float, float | None]]:
    """All that a store's files hold: key -> log-probability and gain."""
    scores = {}
    for file in store.path.glob("*.parquet"):
        rows = pq.read_table(file).to_pydict()
        scores |= dict(zip(rows["key"], zip(rows["logps"], rows["gain"], strict=True), strict=True))
    return scores
