"""``python -m benchmarks.memory``: the formula of `bdpo doctor` for memory beside measured peaks.

What is measured is what PyTorch's allocator gives out on a CPU: weights, optimizer states, and the
peak within a training step of two micro-batches, and within a batch of the reference pass. What a
GPU takes beside that (CUDA itself, fragmentation, kernels that need space of their own) is not.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo_plugin.inspection.memory import GIB, estimate, weightless
from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.inspection.plan import Plan
from bdpo_plugin.model.reader import ResponseReader
from benchmarks.runs import console, json_option, save

_SIZES = {"vocab_size": 1024, "num_hidden_layers": 4, "tie_word_embeddings": False}
#: Three models of the families of the recipes, with other proportions each.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


class Way(NamedTuple):
    """A way to train: the rank of the adapter (0 for all weights), whether weights and activations
    have 16 bits, and whether activations are computed again."""

    rank: int
    half: bool
    checkpointing: bool


WAYS = {
    "LoRA in 32 bits": Way(8, False, False),
    "LoRA in 16 bits, checkpointed": Way(8, True, True),
    "full in 32 bits": Way(0, False, False),
    "full in 16 bits, checkpointed": Way(0, True, True),
}
_ROWS, _LENGTH, _PROMPT = 2, 128, 8


class Peaks(NamedTuple):
    """The peak of training and that of the reference pass, in GiB: estimated and measured."""

    estimated: float
    measured: float
    estimated_scoring: float
    measured_scoring: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured

    @property
    def scoring_ratio(self) -> float:
        return self.estimated_scoring / self.measured_scoring


def allocated(run: Callable[[], None]) -> int:
    """Returns the most bytes that a function has allocated at a time, in tensors and within
    PyTorch's operations, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peaks(name: str, way: Way) -> Peaks:
    """Estimates and measures the memory of one of :data:`MODELS`."""
    config = AutoConfig.for_model(name, **_SIZES | MODELS[name])
    each = 2 if way.half else 4
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = Plan(
            model=folder,
            bytes_per_weight=each,
            trained_bytes=4 if way.rank else each,
            computed_bytes=each,
            rank=way.rank,
            targets=None,
            rows=_ROWS,
            max_length=_LENGTH,
            checkpointing=way.checkpointing,
            optimizer_bytes=2 * (4 if way.rank else each),
            pass_tokens=2 * _ROWS * _LENGTH,
        )
        memory = estimate(Shape.of(weightless(plan)), plan)
    held, step, scoring = _measured(config, way)
    before = memory.weights + memory.adapter
    return Peaks(
        memory.training,
        (sum(held) + step) / GIB,
        before + memory.scoring,
        (held[0] + scoring) / GIB,
    )


def _measured(config: Any, way: Way) -> tuple[tuple[int, int], int, int]:
    """Returns the bytes of the weights and of the optimizer, and the peaks beyond them."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if way.half else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if way.rank:
        model = get_peft_model(model, LoraConfig(r=way.rank, target_modules="all-linear"))
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way.rank:
        for parameter in trained:
            parameter.data = parameter.data.float()
    if way.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(5, config.vocab_size, (2 * _ROWS, _LENGTH))
    ids[_ROWS:, :_PROMPT] = ids[:_ROWS, :_PROMPT]
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[:, _PROMPT - 1 : -1] = True
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    reader, labels = ResponseReader(), ids[:, _PROMPT:].flatten()
    reader.probe(model, inputs, torch.device("cpu"))
    autocast = torch.autocast("cpu", torch.bfloat16) if way.half else contextlib.nullcontext()

    def forward() -> torch.Tensor:
        with autocast:
            return reader.token_statistics(model, read, labels, **inputs)[0].logps.sum()

    def step() -> None:
        for _ in range(2):  # micro-batches
            forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the states of the optimizer
    states = [t for of in optimizer.state.values() for t in of.values() if torch.is_tensor(t)]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = weights, sum(tensor.nbytes for tensor in states)
    return held, allocated(step), allocated(torch.no_grad()(lambda: [forward(), None][1]))


@click.command()
@json_option
def main(json_file: Path | None) -> None:
    """Beside each other, for three small models: the formula for memory, and measured peaks."""
    table = Table("model", "way", "training [MiB]", "formula", "scoring [MiB]", "formula")
    results = []
    for name in MODELS:
        for title, way in WAYS.items():
            found = peaks(name, way)
            results.append({"model": name, "way": title, **found._asdict()})
            table.add_row(
                name,
                title,
                f"{found.measured * 1024:.1f}",
                f"{found.estimated * 1024:.1f} ({found.ratio:.2f})",
                f"{found.measured_scoring * 1024:.1f}",
                f"{found.estimated_scoring * 1024:.1f} ({found.scoring_ratio:.2f})",
            )
    console().print(table)
    save(json_file, models=MODELS, sizes=_SIZES, pairs=_ROWS, length=_LENGTH, results=results)


if __name__ == "__main__":
    main()
