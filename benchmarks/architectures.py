"""``python -m benchmarks.architectures``: what is laid in a row, and whether scores move.

A tiny model of every causal architecture that the installed transformers know and that a tiny
configuration can be made of, in float32 and bfloat16.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdpo_plugin.model.padding import Padding
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference.batches import budgeted_batches
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 384

#: Of each field that a configuration has, whatever the architecture.
SMALL = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "n_shared_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    "sliding_window": 8,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
}
_LINEAR = {  # gated delta nets
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_ROTARY = {"rotary_dim": 8}

_OWN_HEADS = {"head_dim": None}

_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}

#: Beside or in the place of `SMALL`; None: the configuration's own value.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("minicpm3", "youtu", "longcat_flash"), _LATENT),
    "deepseek_v32": _LATENT | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8},
    "glm_moe_dsa": _LATENT | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _LINEAR),
    **dict.fromkeys(("codegen", "gptj"), _ROTARY),
    **dict.fromkeys(("falcon", "gemma4_text", "gemma4_unified_text"), _OWN_HEADS),
    "falcon_alibi": {"head_dim": None, "alibi": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLUTION),
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "xlnet": {"max_position_embeddings": None},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 1},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
}

#: Forms of an architecture that its own configuration does not have, and whose they are.
FORMS = {"falcon_alibi": "falcon"}

#: Above this a tiny model is none.
_TOO_MANY = 20_000_000


class NotTiny(Exception):
    """No tiny model can be made of the architecture; says why."""


@dataclass
class Found:
    """Of one architecture in one dtype; scores in nats.

    Attributes:
        rows: ``shared`` or ``padded``.
        chunked: whether the output layer is run in chunks.
        rounding: the largest difference between scores by plain forwards of the model on one
            sequence each and on a padded batch of all; the rounding of one logit at least.
        moved: the largest difference between `bdpo_score_tokens` of 1 and 4096.
        off: the largest difference of either from those plain forwards.
        padding: whether what the model says depends on padding, and by how much where it does:
            nats where the padding is on the right, nats where it is on the left.
    """

    rows: str
    chunked: bool
    rounding: float
    moved: float
    off: float
    padding: Padding

    @property
    def depends(self) -> str:
        """In words: nothing where it does not."""
        if self.padding.right.unknown:
            return "not known"
        told = {side: one for side, one in self.padding._asdict().items() if one.beyond_rounding}
        return ", ".join(f"{side} {one.nats:.2g}" for side, one in told.items())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tiny configurations make transformers say much."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def names() -> list[str]:
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FORMS])


def tiny(name: str) -> nn.Module:
    """A float32 model whose weights make leaks visible: its largest logit is about 25, as in
    trained models.

    Raises:
        NotTiny: none can be made; says why.
    """
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = _model(name)
            _scale(model)
            return model
    except NotTiny:
        raise
    except Exception as error:  # whatever some configuration may do
        raise NotTiny(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from error


def _model(name: str) -> nn.Module:
    example = AutoConfig.for_model(FORMS.get(name, name))
    fields = {key: value for key, value in SMALL.items() if _has(example, key)}
    fields |= SPECIAL.get(name, {})
    config = type(example)(**{k: v for k, v in fields.items() if v is not None})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _TOO_MANY:
        raise NotTiny(f"{size // 10**6} million parameters, whatever is made small")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # such as a field that differs between layers
        return False


@torch.no_grad()
def _scale(model: nn.Module) -> None:
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight.mul_(2.5)
    for _ in range(3):  # where the output layer is tied, it takes more than one
        top = model(input_ids=torch.arange(10, 60)[None], use_cache=False).logits.abs().max()
        if not top.isfinite():
            raise NotTiny("its logits are not finite")
        head = model.get_output_embeddings()
        if head is not None and top > 0:
            head.weight.mul_(25 / top)


def jobs(number: int) -> list[ScoreRequest]:
    """Prompts of up to 30 tokens, responses of up to 25, two to a prompt."""
    rng, found = np.random.default_rng(0), []
    while len(found) < number:
        prompt = rng.integers(5, VOCABULARY, rng.integers(5, 31))
        found += [
            ScoreRequest(prompt, rng.integers(5, VOCABULARY, rng.integers(3, 26))) for _ in "ab"
        ]
    return found


@torch.no_grad()
def plain(
    model: nn.Module, work: list[ScoreRequest], *, rows: int = 1, side: str = "right"
) -> np.ndarray:
    """The scores by plain forwards of the model on batches of `rows`, padded on a side."""
    scores = np.full(len(work), np.nan)
    for start in range(0, len(work), rows):
        batch = work[start : start + rows]
        width = max(job.length for job in batch)
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
        ends = [width if side == "left" else job.length for job in batch]
        for i, (job, end) in enumerate(zip(batch, ends, strict=True)):
            ids[i, end - job.length : end] = torch.tensor([*job.prompt_ids, *job.completion_ids])
            mask[i, end - job.length : end] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if side == "left":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logps = model(**inputs).logits.float().log_softmax(-1)
        for i, (job, end) in enumerate(zip(batch, ends, strict=True)):
            response = torch.tensor(job.completion_ids)
            of_row = logps[i, end - len(response) - 1 : end - 1]
            scores[start + i] = of_row.gather(-1, response[:, None]).sum()
    return scores


@torch.no_grad()
def ours(
    model: nn.Module, work: list[ScoreRequest], budget: int
) -> tuple[np.ndarray, ResponseReader]:
    reader, scores = ResponseReader(), np.full(len(work), np.nan)
    for batch, found in score_requests(model, reader, work, budgeted_batches(work, budget), CPU):
        scores[batch] = found[:, 0]
    return scores, reader


def look(model: nn.Module, dtype: torch.dtype, number: int = 16) -> Found:
    """What is done with the model in this dtype, and what it does to scores."""
    work = jobs(number)
    with quiet():
        model = model.to(dtype)
        alone = plain(model, work)
        (one, _), (many, reader) = (ours(model, work, budget) for budget in (1, 4096))
        can = reader.capabilities(model)
        padded = [plain(model, work, rows=number)]
        if can.rows.shared:
            padded.append(plain(model, work, rows=number, side="left"))
    rounding = max(np.abs(scores - alone).max() for scores in padded)
    # one rounding of a logit, and of float32 sums of logits
    eps = torch.finfo(torch.float32).eps
    floor = max(torch.finfo(dtype).eps * 25 / 2, 2 * eps * np.abs(alone).max())
    return Found(
        "shared" if can.rows.shared else "padded",
        can.chunked,
        float(max(rounding, floor)),
        float(np.abs(one - many).max()),
        float(max(np.abs(scores - alone).max() for scores in (one, many))),
        can.padding,
    )


#: Of :attr:`Found.rounding`: what a difference may be. The second has room for the model's own
#: post-processing of its logits, which rounds them once more where ours is in float32.
MOST_MOVED, MOST_OFF = 3, 6


def faults(found: dict[torch.dtype, Found]) -> list[str]:
    """What must not be, in words."""
    told = []
    for dtype, one in found.items():
        if not one.moved <= MOST_MOVED * one.rounding:
            told.append(f"{dtype}: scores move with bdpo_score_tokens")
        if not one.off <= MOST_OFF * one.rounding:
            told.append(f"{dtype}: scores are not those of each sequence alone")
    kinds = ["padded", "shared"]
    if kinds.index(found[torch.bfloat16].rows) > kinds.index(found[torch.float32].rows):
        told.append("more is done in bfloat16 than float32 allows")
    return told


def _page(tried: dict[str, dict[torch.dtype, Found]], left_out: dict[str, str]) -> str:
    counts = Counter(found[torch.bfloat16].rows for found in tried.values())
    whole = [n for n, found in tried.items() if not all(one.chunked for one in found.values())]
    lines = [
        "# Architectures",
        "",
        "Written by `python -m benchmarks.architectures`, with transformers "
        f"{transformers.__version__} and torch {torch.__version__.split('+')[0]} on the CPU: a "
        "tiny model with random weights of every causal architecture of transformers that a tiny "
        "configuration can be made of, attention as transformers chooses it.",
        "",
        "A batch is *shared* where its sequences lie in one row, without padding, and what they "
        "have in common at their beginning runs once; *padded* where it keeps the padding that its "
        "host gave it. Shared is what is known to mix positions by attention alone, through the "
        "attention interface of transformers and by SDPA or flash attention, and was then seen to "
        "keep neighbours apart: other tokens in the place of a neighbour change not one bit, and "
        "no gradient of a layer's attention reaches it.",
        "",
        "The figures are differences of scores (nats, responses of 3 to 25 tokens, the largest "
        "logit about 25) in units of rounding: the largest difference that padding makes to the "
        "model's own plain forwards in that dtype, and at least the rounding of one logit (0.1 "
        "nats in bfloat16). *Moved*: between `bdpo_score_tokens` of 1 and 4096. *Off*: from a "
        "plain forward of each sequence alone; it includes the rounding of the model's own "
        "post-processing of its logits, which is done in float32 here.",
        "",
        "*Depends on padding*: whether what the model says of a sequence depends, beyond rounding, "
        "on how much padding is on its right or left (float32), and by how many nats a token's "
        "log-probability then changes. The hosts pad on the right. A run with a model that depends "
        "on that says so at its start: such a model is scored in other batches than it is trained "
        "in, unless `bdpo_precompute: false`.",
        "",
        f"{len(tried)} of {len(tried) + len(left_out)} were tried; of these {counts['shared']} are "
        f"shared and {counts['padded']} padded (bfloat16).",
        "",
        "| architecture | float32 | bfloat16 | moved, float32 | bfloat16 | off, float32 | bfloat16 "
        "| depends on padding | faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in tried.items():
        one, two = (found[dtype] for dtype in DTYPES)
        figures = [one.moved / one.rounding, two.moved / two.rounding]
        figures += [one.off / one.rounding, two.off / two.rounding]
        cells = [name, one.rows, two.rows, *(f"{x:.1f}" for x in figures), one.depends]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(faults(found))} |")
    lines += ["", "## Output layers that are not run in chunks", ""]
    lines += [", ".join(whole) or "None of the above.", ""]
    lines += ["## Not tried", "", "| architecture | why |", "| --- | --- |"]
    lines += [f"| {name} | {why.replace('|', '/')} |" for name, why in left_out.items()]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, show_default=False)
@click.argument("only", nargs=-1)
def main(page: Path, only: tuple[str, ...]) -> None:
    """Tries the architectures, or those named alone, and writes docs/architectures.md."""
    torch.set_num_threads(1)
    tried, left_out = {}, {}
    for name in only or names():
        try:
            tried[name] = {dtype: look(tiny(name), dtype) for dtype in DTYPES}
            click.echo(f"{name}: {', '.join(one.rows for one in tried[name].values())}")
            for fault in faults(tried[name]):
                click.echo(f"  FAULT {fault}")
        except NotTiny as error:
            left_out[name] = str(error)
            click.echo(f"{name}: not tried: {error}")
    page.write_text(_page(tried, left_out), encoding="utf-8")
    if any(faults(found) for found in tried.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
