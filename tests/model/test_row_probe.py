"""What may be laid in a row: told from the kinds of the layers, then tried."""

from dataclasses import replace

import pytest
import torch
from small_models import recast, small_model
from torch import nn
from transformers import Qwen2ForCausalLM

from bdpo_plugin.model import probe as trial
from bdpo_plugin.model import reader
from bdpo_plugin.model import tree_attention as tree
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.row_probe import SharedPrefixSupport, try_rows
from bdpo_plugin.model.traits import Traits, evaluation, output_layer, row_rules


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
    traits = replace(Traits.of(model), attends_only=True)  # as that is told without a trial
    rules = row_rules(model, traits, inputs)
    tokens = inputs["input_ids"].flatten() if tokens is None else tokens
    return model, output_layer(model), rules, inputs, tokens


def attends_only(model):
    return Traits.of(model).attends_only


def tried(model, tokenizer):
    with torch.no_grad(), evaluation(model):
        found = try_rows(*arguments(model, tokenizer))
    assert found.shared == (not found.why)
    return found.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in ("tied", "untied", "gpt2", "moe", "logits_scaling")),
        ("soft-capped", {"sliding_window": 5}),
        ("moe", {"sliding_window": 30}),
    ],
)
def test_attention_passes_in_every_dtype(tokenizer, architecture, options, dtype):
    model = small_model(tokenizer, architecture, **options)
    if not model._supports_sdpa:
        pytest.skip("this release of transformers has no SDPA for it")
    model.set_attn_implementation("sdpa")
    assert attends_only(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        model = model.bfloat16() if dtype == torch.bfloat16 else model
        assert tried(model, tokenizer) == ""


@pytest.mark.parametrize("autocast", [False, True])
def test_depth_is_no_reason(tokenizer, autocast):
    model = small_model(tokenizer, layers=40).to(torch.float32 if autocast else torch.bfloat16)
    model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert tried(model, tokenizer) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", [Convolution, Recurrence, Shift])
def test_a_layer_that_mixes_is_told_by_its_kind_and_seen_when_tried(tokenizer, mixer, dtype):
    """Its effect is one part in a hundred: below what bfloat16 rounds in a few layers."""
    model = model_with(tokenizer, mixer).to(dtype)
    assert not attends_only(model)
    assert "other tokens in one sequence change another one" in tried(model, tokenizer)


@pytest.mark.parametrize("distance", [1, 20, 35])
def test_what_leaks_from_afar_is_seen(tokenizer, distance):
    """No sequence of a trial is shorter."""

    def leak(_, __, output):
        return output + 0.01 * output.roll(distance, dims=1) * (output.shape[0] == 1)

    model = model_with(tokenizer)
    model.model.layers[0].register_forward_hook(leak)
    assert "other tokens in one sequence" in tried(model, tokenizer)


# --- rows that are laid wrongly -------------------------------------------------------------


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])


def refused(model, tokenizer, dtype):
    model = model.bfloat16() if dtype == torch.bfloat16 else model
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        return tried(model, tokenizer)


@BOTH
def test_positions_that_are_not_read(tokenizer, dtype):
    model = model_with(tokenizer, architecture="untied")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def place_in_row(states, position_ids, *args, **kwargs):
        return forward(states, torch.arange(states.shape[1])[None], *args, **kwargs)

    rotary.forward = place_in_row
    assert "do not read the positions" in refused(model, tokenizer, dtype)


def replaced(monkeypatch, change):
    """Attention by segments, with something changed of its arguments."""
    by_segments = tree._by_segments

    def changed(attend, given, module, query, key, value, **kwargs):
        return by_segments(*change(attend, given, module, query, key, value), **kwargs)

    monkeypatch.setattr(tree, "_by_segments", changed)


@BOTH
def test_scores_of_attention_off_by_a_factor(tokenizer, dtype, monkeypatch):
    replaced(monkeypatch, lambda *a: (*a[:3], a[3] * 0.97, *a[4:]))
    assert "attention differs" in refused(model_with(tokenizer), tokenizer, dtype)


@BOTH
@pytest.mark.parametrize("first", [False, True])
def test_one_token_too_few_of_the_beginning(tokenizer, dtype, monkeypatch, first):
    def fewer(attend, given, module, *states):
        if not first:  # the last one
            return (
                attend,
                replace(given, before=[max(0, n - 1) for n in given.before]),
                module,
                *states,
            )
        # the second one in its place
        states = [torch.cat([x[:, :, 1:2], x[:, :, 1:]], dim=2) for x in states]
        return attend, given, module, *states

    replaced(monkeypatch, fewer)
    why = refused(model_with(tokenizer), tokenizer, dtype)
    assert ("attention differs" if first else "the common beginning is not read") in why


@BOTH
def test_one_token_of_a_neighbour(tokenizer, dtype, monkeypatch):
    """The first of the last sequence's keys and values is the last of its neighbour's."""

    def leak(attend, given, module, query, *states):
        start = given.sizes[0] + given.sizes[1]
        states = [
            torch.cat([x[:, :, :start], x[:, :, start - 1 : start], x[:, :, start + 1 :]], dim=2)
            for x in states
        ]
        return attend, given, module, query, *states

    replaced(monkeypatch, leak)
    assert "other tokens in one sequence" in refused(model_with(tokenizer), tokenizer, dtype)


@BOTH
def test_logits_off_by_a_factor(tokenizer, dtype):
    class Slightly(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 0.97
            return outputs

    model = recast(model_with(tokenizer), Slightly)
    model = model.bfloat16() if dtype == torch.bfloat16 else model
    inputs = batch_of(tokenizer)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    with autocast, pytest.warns(UserWarning, match="does not reproduce the logits"):
        can = ResponseReader().probe(model, inputs, torch.device("cpu"))
    assert not can.chunked


def test_a_model_that_is_told_nothing(tokenizer):
    class Deaf(Qwen2ForCausalLM):
        def forward(self, *args, position_ids=None, bdpo_tree=None, **kwargs):
            return super().forward(*args, position_ids=position_ids, **kwargs)

    assert "do not call the attention" in tried(recast(model_with(tokenizer), Deaf), tokenizer)


def test_an_exception_is_told(tokenizer):
    model = model_with(tokenizer)

    def fail(_, args):
        if args[0].shape[0] == 1:
            raise ValueError("no rows of one, please")

    model.model.norm.register_forward_pre_hook(fail)
    assert tried(model, tokenizer) == "ValueError: no rows of one, please"


def test_the_kinds_are_those_of_the_model_in_its_wrappers(tokenizer):
    peft = pytest.importorskip("peft")
    for mixer in (None, Convolution):
        model = model_with(tokenizer, mixer, "untied")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert attends_only(model) == (mixer is None)


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


@BOTH
@pytest.mark.parametrize("from_afar", [False, True])
def test_a_gradient_that_leaks_where_no_value_does(tokenizer, dtype, monkeypatch, from_afar):
    """As of a kernel whose backward pass does not know where sequences begin, or who shares one."""

    def leak(attend, given, module, query, key, value):
        places = torch.arange(value.shape[2])
        places = places.roll(given.sizes[0] if from_afar else 1)
        return attend, given, module, query, key, value + (value - value.detach())[:, :, places]

    replaced(monkeypatch, leak)
    assert "attention's gradient" in refused(model_with(tokenizer), tokenizer, dtype)


def test_the_loss_of_a_router_is_tried_by_itself(tokenizer, monkeypatch):
    """It wants each token once, and so another row."""
    model, seen = small_model(tokenizer, "moe"), []
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(
        reader, "try_rows", lambda *a: seen.append(a[2]) or SharedPrefixSupport(True)
    )
    tried_first = []
    monkeypatch.setattr(
        trial, "try_rows", lambda *a: tried_first.append(a[2]) or SharedPrefixSupport(True)
    )
    one = ResponseReader()
    inputs = batch_of(tokenizer)
    positions = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for _ in range(2):
        one.read(model, positions, lambda states, head: states, **inputs)
    assert [rules.each_once for rules in tried_first] == [False]
    assert not seen
    for _ in range(2):
        one.read(model, positions, lambda *_: 0, output_router_logits=True, **inputs)
    assert [rules.each_once for rules in seen] == [True]


def test_the_trial_leaves_no_trace(tokenizer):
    model = model_with(tokenizer).train()
    random, gradients = torch.get_rng_state(), [p.grad for p in model.parameters()]
    assert tried(model, tokenizer) == ""
    assert torch.equal(random, torch.get_rng_state())
    assert [p.grad for p in model.parameters()] == gradients
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_memory_that_runs_out_is_not_a_mixed_up_row(tokenizer):
    model = model_with(tokenizer)

    def full(*_):
        raise torch.OutOfMemoryError

    model.model.norm.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        tried(model, tokenizer)


def test_one_token_over_and_over_proves_nothing(tokenizer):
    model = model_with(tokenizer)
    same = arguments(model, tokenizer, torch.full((40,), 7))
    with torch.no_grad():
        assert try_rows(*same).why == "all tokens that it was tried on are the same"
