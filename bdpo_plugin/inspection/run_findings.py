"""The findings of `bdpo doctor` on the memory and the time of a run, and on the form of its
batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.inspection.cost import epoch_cost
from bdpo_plugin.inspection.findings import FAILED, OK, UNKNOWN, WARNING, Finding
from bdpo_plugin.inspection.gpus import USABLE, fits
from bdpo_plugin.inspection.memory import GIB, estimate, weightless
from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.inspection.plan import QUANTISED_BYTES, HostKeys, Plan
from bdpo_plugin.model.traits import Traits, row_rules
from bdpo_plugin.reference.null_prompt import NullPrompt


def run_findings(data: Inspected, null: NullPrompt | str) -> Iterator[Finding]:
    """Yields all findings about a run that need the shape of its model.

    Args:
        data: the data of the run.
        null: its null prompt, or the reason why there is none.
    """
    try:
        model = weightless(data.plan)
    except (OSError, ValueError) as error:
        yield Finding("memory", UNKNOWN, " ".join(str(error).split()))
        return
    yield from _embeddings(model, data)
    shape = Shape.of(model)
    device = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory / GIB
    yield memory_finding(shape, data, device)
    text = torch.zeros(1, 1, dtype=torch.long)
    rules = row_rules(model, Traits.of(model), {"input_ids": text, "attention_mask": text})
    words = (
        f"padded, as the host's: {rules}"
        if isinstance(rules, str)
        else "a row without padding, in which the prompt of a pair stands once, if a probe of the "
        "model confirms that"
    )
    yield Finding("batches", OK, f"{model.config._attn_implementation} attention; {words}")
    if data.pairs and not isinstance(null, str):
        yield _cost(shape, data, null, shared=not isinstance(rules, str))


def _embeddings(model: Any, data: Inspected) -> Iterator[Finding]:
    rows = model.get_input_embeddings().num_embeddings
    most = max((int(s.prompt_ids.max(initial=0)) for p in data.pairs for s in p), default=0)
    most = max(most, *(int(s.completion_ids.max(initial=0)) for p in data.pairs for s in p), 0)
    if most >= rows and not data.resizes:
        yield Finding(
            "special tokens", FAILED,
            f"the data has the token {data.tokenizer.convert_ids_to_tokens(most)!r} (number {most})"
            f", and the model has embeddings for {rows} tokens: the template added it to the "
            "tokenizer alone. The run would end with an error of an index",
            data.keys.resized,
        )  # fmt: skip


def memory_finding(shape: Shape, data: Inspected, device: float | None) -> Finding:
    """Returns the finding about the memory of a run.

    Args:
        shape: the sizes of the model.
        data: the data of the run.
        device: the memory of its device, in GiB; None if there is no GPU.
    """
    plan, keys = data.plan, data.keys
    found = estimate(shape, plan)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in found._asdict().items())
    words = (
        f"about {_size(found.peak)} GiB on one device, by formula, for {plan.rows} pairs a step "
        f"with both responses as long as `{keys.length}: {plan.max_length}` allows "
        f"(in GiB: {parts})"
    )
    if 0 < data.longest < plan.max_length:
        longest = dataclasses.replace(plan, max_length=data.longest)
        words += f"; at your longest, {data.longest} tokens, {_size(estimate(shape, longest).peak)}"
    if plan.rank is None:
        words += "; the adapter's part is not known"
    if plan.sharded:
        shares = ", ".join(f"{_size(estimate(shape, plan, n).peak)} on {n}" for n in (2, 4, 8))
        words += f"; shared among processes: {shares}"
    without = None
    if plan.checkpointing:
        without = estimate(shape, dataclasses.replace(plan, checkpointing=False)).peak
        words += f"; without gradient checkpointing {_size(without)}"
    if device is None:
        return Finding("memory", UNKNOWN, f"{words}; there is no GPU to compare with")
    if without is not None and fits(without, device):
        words += ", which fits too, and saves a fourth to a third of a step"
    words += f"; the GPU has {device:.0f}, of which an estimate may fill {USABLE:.0%}"
    if fits(found.peak, device):
        return Finding("memory", OK, words)
    return Finding("memory", WARNING, words, smaller(shape, plan, keys, device))


def _size(size: float) -> str:
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def smaller(shape: Shape, plan: Plan, keys: HostKeys, device: float) -> str:
    """Returns the first change of a configuration that fits into a device, as lines of YAML: more
    gradient checkpointing, fewer pairs a step, weights in 4 bits, in this order."""
    lines: list[str] = []
    if not plan.checkpointing:
        plan = dataclasses.replace(plan, checkpointing=True)
        lines.append(keys.checkpointing)
    one = dataclasses.replace(plan, rows=1)
    if (
        plan.rank != 0
        and plan.bytes_per_weight >= 2
        and not fits(estimate(shape, one).peak, device)
    ):
        plan = dataclasses.replace(plan, bytes_per_weight=QUANTISED_BYTES[4])
        lines.append(keys.quantised)
    rows = plan.rows
    while plan.rows > 1 and not fits(estimate(shape, plan).peak, device):
        plan = dataclasses.replace(plan, rows=plan.rows // 2)
    if plan.rows != rows:
        lines += [
            f"{keys.rows}: {plan.rows}",
            f"{keys.accumulation}: {-(-plan.batch // plan.rows)}",
        ]
    if not fits(estimate(shape, plan).peak, device):
        return "Take a smaller model, a GPU with more memory, or several (ZeRO-3)"
    return "\n".join(lines)


def _cost(shape: Shape, data: Inspected, null: NullPrompt, *, shared: bool) -> Finding:
    """Returns the cost of an epoch relative to the host's own DPO."""
    settings = data.settings
    measured = settings.weighs or settings.control is not None
    found = epoch_cost(shape, data.plan, data.pairs, len(null.ids), shared=shared, mi=measured)
    step, scoring = found.ours / found.host, found.scoring / found.host
    return Finding(
        "cost",
        UNKNOWN if data.plan.rank is None else OK,
        "in operations of an epoch of the host's own DPO on these pairs, counted: the first epoch "
        f"{step + scoring:.2f} (steps {step:.2f}, scoring {scoring:.2f}), with scores kept from an "
        f"earlier run {step:.2f}, each further epoch {step:.2f}; at `bdpo_alpha: 0` "
        f"{step + found.plain_scoring / found.host:.2f}",
    )
