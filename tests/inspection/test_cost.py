"""What `bdpo doctor` counts of an epoch, beside what torch counts of one that is run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_memory import plan, write_7b
from torch.utils.flop_counter import FlopCounterMode

from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.demo.tiny import build_model, build_tokenizer
from bdpo_plugin.inspection.cost import epoch_cost
from bdpo_plugin.inspection.memory import estimate, weightless
from bdpo_plugin.inspection.model_shape import Shape
from bdpo_plugin.model.reader import ResponseReader


def pair_of(prompt: int, *responses: int) -> Pair:
    return Pair(*(Side(np.arange(prompt), np.arange(n)) for n in responses))


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [((512, 1024), (0.62, 0.99, 0.83)), ((300, 300), (0.55, 0.86, 0.74))],
    ids=str,
)
def test_lora_at_7b_by_hand(tmp_path, lengths, wanted) -> None:
    """Qwen2-7B, N = 6.53e9 and 5.45e8 in the output layer, checkpointed layers, prompts of P and
    responses of R tokens. DPO: 8 N + 6 head on 2 (P + R) tokens. Ours: 6 N on P + 2 R and 4 head
    on 2 R; the pass 2 N on P + 2 R, and with the mutual information on 2 R more. Attention is a
    twentieth of it."""
    write_7b(tmp_path)
    of_7b = plan(tmp_path, rank=16, checkpointing=True)
    prompt, response = lengths
    pairs = [pair_of(prompt, response, response)]
    found = epoch_cost(Shape.of(weightless(of_7b)), of_7b, pairs, 10, shared=True, mi=True)
    steps, cold, plain = found.ours, found.ours + found.scoring, found.ours + found.plain_scoring
    assert [round(n / found.host, 2) for n in (steps, cold, plain)] == list(wanted)


def test_readme_has_the_memory_and_the_hours_of_its_configuration(tmp_path) -> None:
    """Two pairs a step of at most 1,024 tokens, QLoRA of rank 16, Adam in 32 bits; 20,000 pairs of
    prompts and responses of 128 tokens, at 30 % of 312e12 operations a second."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    write_7b(tmp_path)
    run = plan(tmp_path, bytes_per_weight=0.56, rank=16, checkpointing=True, max_length=1024)
    shape = Shape.of(weightless(run))
    memory = estimate(shape, run)
    adapter = memory.adapter + memory.gradients + memory.optimizer
    for size in (memory.weights, adapter, memory.activations, memory.training):
        assert f"| {size:.2f} |" in readme
    cost = epoch_cost(shape, run, [pair_of(128, 128, 128)], 10, shared=True, mi=True)
    counts = (cost.ours + cost.scoring, cost.host, cost.ours)
    first, theirs, later = (20_000 * n / (3600 * 312e12 * 0.3) for n in counts)
    assert f"that is {first:.1f} hours" in readme
    assert f"DPO takes {theirs:.1f} hours" in readme
    assert f"each later epoch of B-DPO {later:.1f} hours" in readme
    by_formula = 6.53e9 * (8 + 20) * 128 + 16 * 0.545e9 * 128
    assert by_formula == pytest.approx(counts[0], rel=0.01)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_what_is_counted_is_what_is_run(tmp_path, lora) -> None:
    """Torch counts the products of matrices, and of attention on the CPU none: so on a model with
    little of that."""
    peft = pytest.importorskip("peft")
    prompt, responses = 20, (12, 12)
    model = build_model(build_tokenizer(), hidden_size=256, layers=6, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    ids = torch.arange(5, 5 + prompt + 12).repeat(2, 1)
    ids[1, prompt:] += 40
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, prompt - 1 : -1] = True
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reader, labels = ResponseReader(), ids[:, prompt:].flatten()
    reader.probe(model, inputs, torch.device("cpu"))

    def theirs() -> None:
        model(**inputs).logits.sum().backward()
        with torch.no_grad():
            model(**inputs)

    def ours() -> None:
        reader.token_statistics(model, positions, labels, **inputs)[0].logps.sum().backward()

    def scoring() -> None:
        with torch.no_grad():
            reader.token_statistics(model, positions, labels, **inputs)

    of_model = plan(tmp_path, rank=1 if lora else 0)
    pairs = [pair_of(prompt, *responses)]
    found = epoch_cost(Shape.of(weightless(of_model)), of_model, pairs, 4, shared=True, mi=True)
    assert found.host == pytest.approx(counted(theirs), rel=0.06)
    assert found.ours == pytest.approx(counted(ours), rel=0.06)
    assert found.plain_scoring == pytest.approx(counted(scoring), rel=0.06)


def test_what_is_padded_costs_more(tmp_path) -> None:
    build_model(build_tokenizer()).save_pretrained(tmp_path)
    of_model = plan(tmp_path)
    shape, pairs = Shape.of(weightless(of_model)), [pair_of(30, 10, 20)]
    shared, padded = (
        epoch_cost(shape, of_model, pairs, 4, shared=shared, mi=True) for shared in (True, False)
    )
    assert shared.host == padded.host
    assert shared.ours < padded.ours < padded.host
    assert shared.scoring < padded.scoring
    bare = epoch_cost(shape, of_model, pairs, 4, shared=True, mi=False)
    assert bare.scoring == bare.plain_scoring == shared.plain_scoring
