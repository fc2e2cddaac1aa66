"""``python -m benchmarks.branches``: the branches of attention that a machine has, beside padding.

Small models with random weights take a step on the same batch twice: laid in a row, and padded.
Both are held against plain transformers in float32. The row may be off by little more than the
padded batch is.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import utils

from bdpo_plugin.model import tree_attention, varlen_kernel
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.objective import BalanceWeights, ChosenRejected, bdpo_loss
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.step import LossTerms, preference_step
from benchmarks.runs import json_option, progress, save

#: Class -> its fields beside the usual ones: all heads their own keys, shared keys, windows that
#: are shorter than most sequences.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 24},
}
_VOCABULARY, _HIDDEN = 256, 128
_USUAL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    # so that attention looks at few tokens, and a wrong one shows
    "initializer_range": _HIDDEN**-0.5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
#: Attention of transformers -> the function of it that says whether its package is there.
ATTENTION = {
    "sdpa": None,
    "flash_attention_2": "is_flash_attn_2_available",
    "flash_attention_3": "is_flash_attn_3_available",
    "flash_attention_4": "is_flash_attn_4_available",
}
#: Dtype of the weights, and whether they compute under bfloat16's autocast. The last is how
#: trainers run bfloat16.
PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, autocast": (torch.bfloat16, True),
}
NO_PACKAGE = "transformers finds no package for it"
_TERMS = LossTerms(types=("sigmoid",), weights=(1.0,), beta=0.1)
#: How many times what the padded batch is off by the row may be off, and a share of the number
#: itself that is rounding in any case.
TIMES, LEAST = 4.0, 1e-5


class Case(NamedTuple):
    """What is tried: names of :data:`MODELS`, :data:`ATTENTION` and :data:`PRECISIONS`."""

    model: str
    attention: str
    precision: str
    adapter: str
    checkpointing: bool

    @property
    def on_kernel(self) -> bool:
        """Whether it is in half precision, which kernels want."""
        return PRECISIONS[self.precision] != (torch.float32, False)


class Found(NamedTuple):
    """The loss, the log-probability of each response, and the gradients by name."""

    loss: Tensor
    logps: Tensor
    gradients: dict[str, Tensor]


class Padded(ResponseReader):
    """Lays no batch in a row."""

    def read(self, *args: Any, **kwargs: Any) -> Any:
        return super().read(*args, **kwargs | {"may_pack": False})


def cases(
    models: Iterable[str] = MODELS, precisions: Iterable[str] = PRECISIONS
) -> tuple[list[Case], list[str]]:
    """What can be tried here, and what cannot, with the reason."""
    there = [
        case
        for one in product(models, ATTENTION, precisions, ("none", "lora"), (False, True))
        if is_there((case := Case(*one)).attention)
        and (case.on_kernel or not ATTENTION[case.attention])  # flash-attention has no float32
    ]
    return there, [f"{name}: {NO_PACKAGE}" for name in ATTENTION if not is_there(name)]


def is_there(attention: str) -> bool:
    """Whether transformers can load an attention here."""
    asked = ATTENTION[attention]
    return not asked or bool(getattr(utils, asked, bool)())


def compare(case: Case, device: str) -> dict[str, Any]:
    """A row of the table: how far row and padding are off, what was run, and what is wrong."""
    start = time.perf_counter()
    found: dict[str, Any] = {"case": case._asdict(), "kernels": {}, "verdict": "right"}
    try:
        found |= _compared(case, torch.device(device))
    except Exception as error:  # as a table of what works has a row for what does not
        text = " ".join(str(error).split())[:300].replace("|", "/")
        found["verdict"] = f"FAILED: {type(error).__name__}: {text}"
        found["output"] = traceback.format_exc()[-3000:]
    return found | {"seconds": round(time.perf_counter() - start, 3)}


def _compared(case: Case, device: torch.device) -> dict[str, Any]:
    batch = _batch(device)
    exact = _model(case, "eager", device).float()
    with torch.no_grad():
        logps = _plain(exact, batch)
    scores = _scores(logps)
    truth = _plain_step(exact, batch, scores)

    model, reader = _model(case, case.attention, device), ResponseReader()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    autocast = torch.autocast(device.type, torch.bfloat16, PRECISIONS[case.precision][1])
    with autocast:
        rows = reader.probe(model, batch.inputs, device).rows
    with _counted() as kernels:
        row = _step(reader, model, batch, scores, autocast)
    padded = _step(Padded(), model, batch, scores, autocast)
    off = {"row": _off(row, truth), "padded": _off(padded, truth)}
    wrong = _wrong(off)
    wanted = _wanted_kernel(case, device)
    if not rows.shared:
        verdict = f"NOT TAKEN: {rows.why}"
    elif not reader.layouts["training"].batches["shared prefix"]:
        verdict = "NOT TAKEN: the batch kept its padding"
    elif wrong:
        verdict = f"WRONG: {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"
    else:
        verdict = "right" if {*kernels} == {wanted} else f"NOT TAKEN: {wanted}"
    short = {
        name: {what: of_path[what][0] for what in ("loss", "logps", "gradients")}
        for name, of_path in off.items()
    }
    return {"off": short, "kernels": dict(kernels), "verdict": verdict}


def _model(case: Case, attention: str, device: torch.device) -> Any:
    """The same weights at each call."""
    config = getattr(transformers, f"{case.model}Config")(**_USUAL | MODELS[case.model])
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    model = model.to(PRECISIONS[case.precision][0])
    if case.adapter == "lora":
        options = LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")
        model = get_peft_model(model, options)
    return model.to(device).train()


def _batch(device: torch.device) -> PreferenceBatch:
    """Four pairs; two of the prompts begin alike."""
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> Tensor:
        return torch.randint(2, _VOCABULARY, (count,), generator=draw)

    prompts = [tokens(n) for n in (30, 18, 9, 24)]
    prompts[1][:12] = prompts[0][:12]
    lengths = (22, 12, 36, 1, 14, 27, 8, 33)
    rows = [(prompt, tokens(n)) for prompt, n in zip(prompts * 2, lengths, strict=True)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, completion = torch.zeros(3, len(rows), width, dtype=torch.long)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end], mask[i, :end] = torch.cat([prompt, response]), 1
        completion[i, len(prompt) : end] = 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    return PreferenceBatch(inputs, completion.bool().to(device))


def _scores(logps: Tensor) -> dict[str, Tensor]:
    """Of a reference that differs a little from the policy, so that each pair has its say."""
    chosen, rejected = logps.chunk(2)
    spread = torch.linspace(-2, 2, len(chosen), device=logps.device)
    return {
        "bdpo_weight_chosen": 1 + spread / 8,
        "bdpo_weight_rejected": 1 - spread / 8,
        "bdpo_scale": torch.full_like(chosen, 1.1),
        "bdpo_ref_chosen_logps": chosen + spread,
        "bdpo_ref_rejected_logps": rejected - spread.flip(0) / 2,
        "bdpo_mi_chosen": torch.full_like(chosen, math.nan),
        "bdpo_mi_rejected": torch.full_like(chosen, math.nan),
    }


def _plain(model: Any, batch: PreferenceBatch) -> Tensor:
    """The log-probability of each response by nothing but transformers and torch, (2B,)."""
    labels = batch.inputs["input_ids"][:, 1:]
    logps = model(**batch.inputs).logits[:, :-1].float().log_softmax(dim=-1)
    of_tokens = logps.gather(-1, labels[..., None])[..., 0]
    return (of_tokens * batch.completion_mask[:, 1:]).sum(dim=1)


def _plain_step(model: Any, batch: PreferenceBatch, scores: Mapping[str, Tensor]) -> Found:
    logps = _plain(model, batch)
    names = ("bdpo_weight_chosen", "bdpo_weight_rejected", "bdpo_scale")
    weights = BalanceWeights(*(scores[name] for name in names))
    reference = ChosenRejected(scores["bdpo_ref_chosen_logps"], scores["bdpo_ref_rejected_logps"])
    policy = ChosenRejected(*logps.chunk(2))
    loss = bdpo_loss(policy, reference, weights, beta=_TERMS.beta).mean()
    return Found(loss.detach(), logps.detach(), _gradients(model, loss))


def _step(
    reader: ResponseReader,
    model: Any,
    batch: PreferenceBatch,
    scores: Mapping[str, Tensor],
    autocast: torch.autocast,
) -> Found:
    """The step of a run."""
    seen = []

    def pair_loss(policy: ChosenRejected, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.cat(policy).detach())
        return bdpo_loss(policy, *args, **kwargs)

    with autocast:
        loss, *_ = preference_step(reader, model, batch, scores, _TERMS, pair_loss)
    return Found(loss.detach(), seen[0], _gradients(model, loss))


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """How often each way of attending in a row is called."""
    counts: Counter[str] = Counter()

    def counting(function: Any, name: str) -> Any:
        @wraps(function)  # whose signature is asked for
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    places = [(tree_attention, "attend_shared"), (tree_attention, "_by_segments")]
    places += [(varlen_kernel.TORCH, "varlen_attn")] if varlen_kernel.TORCH else []
    with ExitStack() as stack:
        for owner, name in places:
            call = counting(getattr(owner, name), name.removeprefix("_by_"))
            stack.enter_context(patch.object(owner, name, call))
        yield counts
    counts["flash"] = counts.pop("attend_shared", 0) - counts["segments"] - counts["varlen_attn"]
    for name in [name for name, count in counts.items() if not count]:
        del counts[name]


def _wanted_kernel(case: Case, device: torch.device) -> str:
    """What :func:`~bdpo_plugin.model.tree_attention.attend_shared` is to take where all is well."""
    if case.attention != "sdpa":
        return "flash"
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    takes = varlen_kernel.parameters() if able and case.on_kernel else set()
    windowed = "sliding_window" in MODELS[case.model]
    can = "window_size" in takes or (bool(takes) and not windowed)
    return "varlen_attn" if can else "segments"


def _off(found: Found, truth: Found) -> dict[str, tuple[float, float]]:
    """What is compared -> how far it is off, and its size."""

    def size(tensor: Tensor) -> float:
        return float(tensor.norm()) / math.sqrt(tensor.numel())

    if found.gradients.keys() != truth.gradients.keys():
        raise ValueError("other parameters have gradients")
    off = {
        "loss": (float((found.loss - truth.loss).abs()), float(truth.loss)),
        "logps": (size(found.logps - truth.logps), size(truth.logps)),
    }
    whole = math.hypot(*(float(gradient.norm()) for gradient in truth.gradients.values()))
    differences = {
        name: float((found.gradients[name] - gradient).norm())
        for name, gradient in truth.gradients.items()
    }
    off |= {f"gradient of {name}": (x, whole) for name, x in differences.items()}
    return off | {"gradients": (math.hypot(*differences.values()) / whole, 1.0)}


def _wrong(off: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    """What of the row is further off than the padded batch's may be."""
    padded = dict(off["padded"])
    # one number can be right by chance: what its log-probabilities are off by counts as well
    padded["loss"] = (padded["loss"][0] + _TERMS.beta * padded["logps"][0], padded["loss"][1])
    return [
        what
        for what, (own, size) in padded.items()
        if not off["row"][what][0] <= TIMES * own + LEAST * size  # NaN is wrong
    ]


def table(rows: list[dict[str, Any]], left: list[str]) -> Iterator[str]:
    """In Markdown."""
    heads = ("model", "attention", "precision", "adapter", "checkpointing", "run by (calls)")
    heads += ("loss", "log-probabilities [nats]", "gradients, relative", "verdict")
    yield "How far a row, and a padded batch, are from float32 by plain transformers:"
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        case = Case(**row["case"])
        calls = ", ".join(f"{name} {count}" for name, count in row["kernels"].items())
        off = row.get("off")
        cells = [*case[:4], "on" if case.checkpointing else "off", calls or "–"]
        cells += [
            f"{off['row'][what]:.1e}, {off['padded'][what]:.1e}" if off else "–"
            for what in ("loss", "logps", "gradients")
        ]
        yield f"| {' | '.join([*cells, row['verdict']])} |"
    yield ""
    for what in left:
        yield f"- Not tried: {what}"


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--model", "models", type=click.Choice([*MODELS]), multiple=True, help="[default: all]"
)
@click.option(
    "--precision", "precisions", type=click.Choice([*PRECISIONS]), multiple=True, help="Likewise."
)
@json_option
def main(
    device: str, models: tuple[str, ...], precisions: tuple[str, ...], json_file: Path | None
) -> None:
    """Loss, log-probabilities and gradients of a step by every branch of attention that this
    machine has, beside padding; ends with status 1 where one is wrong or is not taken."""
    there, left = cases(models or MODELS, precisions or PRECISIONS)
    rows: list[dict[str, Any]] = []
    with progress(len(there)) as show:
        for case in there:
            show(", ".join(map(str, case[:4])))
            rows.append(compare(case, device))
            save(json_file, rows=rows, left_out=left, planned=len(there))
    click.echo("\n".join(table(rows, left)))
    sys.exit(int(any(row["verdict"] != "right" for row in rows)))


if __name__ == "__main__":
    main()
