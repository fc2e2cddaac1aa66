"""What may be packed: told from the kinds of the layers, then tried, and tried with gradient."""

import pytest
import torch
from small_models import small_model
from torch import nn

from bdpo_plugin.model.packing import Apart
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import Traits, evaluation, output_layer, row_rules
from bdpo_plugin.model.trial import try_gradients, try_rows

TREE = Apart(shared=True)  # and then nothing else is tried, but for learnt positions


class Convolution(nn.Module):
    """As in the hybrids of attention and convolution, with a small effect."""

    def __init__(self, size=32):
        super().__init__()
        self.layer = nn.Conv1d(size, size, 3, groups=size, padding=2)

    def forward(self, states):
        return 0.01 * self.layer(states.mT)[..., :-2].mT


class Recurrence(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.layer = nn.GRU(size, size, batch_first=True)

    def forward(self, states):
        return 0.01 * self.layer(states)[0]


class Shift(nn.Module):
    """No parameters and no layer of torch's: only that it is not known tells of it."""

    def forward(self, states):
        return 0.01 * nn.functional.pad(states, (0, 0, 1, -1))


class Beside(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, states):
        return self.one(states) + self.other(states)


def model_with(tokenizer, mixer=None, architecture="tied", attention="sdpa"):
    model = small_model(tokenizer, architecture)
    model.set_attn_implementation(attention)
    if mixer:
        torch.manual_seed(0)
        layer = model.model.layers[0]
        layer.mlp = Beside(layer.mlp, mixer())
    return model


def batch_of(tokenizer):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(tokenizer), (3, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def arguments(model, tokenizer, tokens=None):
    """What the trials of rows take."""
    inputs = batch_of(tokenizer)
    rules = row_rules(model, Traits.of(model), inputs)
    tokens = inputs["input_ids"].flatten() if tokens is None else tokens
    return model, output_layer(model), rules, inputs, tokens


def attends_only(model):
    return Traits.of(model).attends_only


def tried(model, tokenizer):
    with torch.no_grad(), evaluation(model):
        return try_rows(*arguments(model, tokenizer))


def tried_with_gradient(model, tokenizer):
    return try_gradients(*arguments(model, tokenizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["tied", "untied", "gpt2", "moe", "logits_scaling"])
def test_attention_passes_in_every_dtype(tokenizer, architecture, attention, dtype):
    model = model_with(tokenizer, None, architecture, attention).to(dtype)
    rotary = architecture != "gpt2"
    expected = Apart(packed=not (rotary and attention == "sdpa"), shared=attention == "sdpa")
    assert attends_only(model)
    assert tried(model, tokenizer) == expected
    assert tried_with_gradient(model, tokenizer) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", [Convolution, Recurrence, Shift])
def test_a_layer_that_mixes_is_told_by_its_kind_and_seen_when_tried(
    tokenizer, mixer, attention, dtype
):
    """Its effect is one part in a hundred: below what bfloat16 rounds in a few layers."""
    model = model_with(tokenizer, mixer, attention=attention).to(dtype)
    assert not attends_only(model)
    assert tried(model, tokenizer) == Apart()
    assert tried_with_gradient(model, tokenizer) == Apart()


def test_the_kinds_are_those_of_the_model_in_its_wrappers(tokenizer):
    peft = pytest.importorskip("peft")
    for mixer in (None, Convolution):
        model = model_with(tokenizer, mixer, "untied")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert attends_only(model) == (mixer is None)
    assert tried_with_gradient(model, tokenizer) == Apart()


def test_kinds_that_the_configuration_tells(tokenizer):
    model = small_model(tokenizer)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert attends_only(model)
    model.config.layer_types = ["full_attention", "some_kind_of_tomorrow"]
    assert not attends_only(model)
    model = small_model(tokenizer)
    model.config.kinds_by_another_name = ["attention", "mamba"]
    assert not attends_only(model)
    model = small_model(tokenizer)
    assert attends_only(model)
    model._supports_attention_backend = False
    assert not attends_only(model)


def test_a_gradient_that_leaks_where_no_value_does(tokenizer):
    """As of a kernel whose backward pass does not know where sequences begin."""
    model = model_with(tokenizer)

    def leak(_, __, output):
        before = output.roll(1, dims=1)
        return output + (before - before.detach())

    model.model.layers[0].register_forward_hook(leak)
    assert attends_only(model)
    assert tried(model, tokenizer) == TREE
    assert tried_with_gradient(model, tokenizer) == Apart()

    torch.manual_seed(2)
    ids, mask = torch.randint(5, len(tokenizer), (3, 40)), torch.zeros(3, 40, dtype=torch.long)
    for row, length in enumerate((40, 7, 5)):
        mask[row, :length] = 1
    positions = mask.bool().roll(-1, dims=1) & mask.bool()
    labels, reader, seen = ids.roll(-1, dims=1)[positions], ResponseReader(), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        reader.token_statistics(model, positions, labels, **inputs)
    assert seen[-1].numel() < ids.numel()
    for _ in range(2):
        reader.token_statistics(model, positions, labels, **inputs)
        assert seen[-1] == ids.shape


def test_the_trial_leaves_no_trace(tokenizer):
    model = model_with(tokenizer).train()
    random, gradients = torch.get_rng_state(), [p.grad for p in model.parameters()]
    with evaluation(model):
        assert tried_with_gradient(model, tokenizer) == TREE
    assert tried(model, tokenizer) == TREE
    assert torch.equal(random, torch.get_rng_state())
    assert [p.grad for p in model.parameters()] == gradients
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_memory_that_runs_out_is_not_a_mixed_up_row(tokenizer):
    model = model_with(tokenizer)

    def full(*_):
        raise torch.OutOfMemoryError

    model.model.norm.register_forward_hook(full)
    for trial in (tried, tried_with_gradient):
        with pytest.raises(torch.OutOfMemoryError):
            trial(model, tokenizer)


def test_one_token_over_and_over_proves_nothing(tokenizer):
    model = model_with(tokenizer)
    same = arguments(model, tokenizer, torch.full((40,), 7))
    with torch.no_grad():
        assert try_rows(*same) == Apart()
