"""The memory of a run, estimated from the shape of its model."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo_plugin.demo.tiny import build_model, build_tokenizer
from bdpo_plugin.hosts.axolotl.plan import KEYS
from bdpo_plugin.inspection import memory
from bdpo_plugin.inspection.memory import Memory, weightless
from bdpo_plugin.inspection.memory import estimate as of_shape
from bdpo_plugin.inspection.model_shape import Shape, known_shapes
from bdpo_plugin.inspection.plan import Plan
from bdpo_plugin.inspection.run_findings import smaller
from bdpo_plugin.model import head
from bdpo_plugin.reference.batches import SCORE_TOKENS_ON_GPU


def plan(model, **changes) -> Plan:
    given = {
        "bytes_per_weight": 4,
        "trained_bytes": 4,
        "computed_bytes": 2,
        "rank": 0,
        "targets": None,
        "rows": 2,
        "max_length": 128,
        "checkpointing": False,
        "optimizer_bytes": 8,
        "pass_tokens": 4096,
    }
    return Plan(model=str(model), **{**given, **changes})


def estimate(plan: Plan) -> Memory:
    return of_shape(Shape.of(weightless(plan)), plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = build_model(build_tokenizer())
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return folder, made


def test_memory_of_weights_and_optimizer_is_counted(model) -> None:
    folder, made = model
    weights = sum(p.numel() for p in made.parameters()) * 4 / 2**30
    found = estimate(plan(folder))
    assert found.weights == pytest.approx(weights)
    assert found.gradients == pytest.approx(weights)
    assert found.optimizer == pytest.approx(2 * weights)
    assert estimate(plan(folder, optimizer_bytes=2)).optimizer == pytest.approx(weights / 2)
    assert estimate(plan(folder, checkpointing=True)).activations < found.activations
    in_full = estimate(plan(folder, computed_bytes=4)).activations
    assert found.activations < in_full < 2 * found.activations  # the logits stay as they are


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_memory_of_an_adapter_is_pefts(model, targets) -> None:
    from peft import LoraConfig, get_peft_model

    folder, _ = model
    config = LoraConfig(r=4, target_modules=targets or "all-linear")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    found = estimate(plan(folder, rank=4, targets=targets))
    assert found.adapter == pytest.approx(trained * 4 / 2**30)
    assert found.optimizer == pytest.approx(2 * trained * 4 / 2**30)


def write_7b(folder: Path) -> None:
    """The configuration of Qwen2-7B's shape."""
    AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)


def test_memory_of_a_7b_model_is_that_of_its_configuration(tmp_path) -> None:
    """Qwen2-7B's shape; nothing of it is in memory. Its 7.6 billion weights are 14.2 GiB in 16
    bits, and a fine-tune of all of them needs as much for the gradients and twice that for Adam."""
    write_7b(tmp_path)
    full = estimate(plan(tmp_path, bytes_per_weight=2, trained_bytes=2, checkpointing=True))
    assert full.weights == pytest.approx(14.2, abs=0.1)
    assert full.training > 4 * full.weights
    small = estimate(
        plan(tmp_path, bytes_per_weight=0.56, rank=16, checkpointing=True, max_length=1024)
    )
    assert 5 < small.weights < 6
    assert small.peak < 16


def test_constants_that_are_written_twice_are_the_same() -> None:
    assert memory.CHUNK_ELEMENTS == head.CHUNK_ELEMENTS
    assert SCORE_TOKENS_ON_GPU[0] == memory.SCORE_TOKENS


def test_what_zero_3_shares() -> None:
    """16 bytes for each weight in DeepSpeed's mixed precision, divided by the processes; and the
    10^9 weights that it gathers at most."""
    shape = known_shapes()["Qwen/Qwen2-7B-Instruct"]
    full = plan("", bytes_per_weight=2, trained_bytes=2, optimizer_bytes=12, sharded=True)
    alone, four = of_shape(shape, full), of_shape(shape, full, processes=4)
    held = [m.weights + m.gradients + m.optimizer for m in (alone, four)]
    assert held[0] == pytest.approx(16 * shape.weights / 2**30)
    assert held[1] == pytest.approx((4 * shape.weights + 2e9) / 2**30)
    assert four.activations == alone.activations
    assert of_shape(shape, replace(full, sharded=False), processes=4) == alone


@pytest.mark.parametrize(
    ("device", "fix"),
    [
        (80, "gradient_checkpointing: true"),
        (20, "gradient_checkpointing: true\nmicro_batch_size: 2\ngradient_accumulation_steps: 16"),
        (10, "gradient_checkpointing: true\nadapter: qlora\nload_in_4bit: true"),
        (5, "Take a smaller model, a GPU with more memory, or several (ZeRO-3)"),
    ],
)
def test_the_smallest_change_that_fits(device, fix) -> None:
    shape = known_shapes()["Qwen/Qwen2-7B-Instruct"]
    run = plan("", bytes_per_weight=2, rank=16, max_length=1024, rows=8, batch=32)
    found = smaller(shape, run, KEYS, device)
    assert found.startswith(fix)
