"""What computes with a reference's weights is part of its identity; what only wraps them is not."""

import os
import subprocess
import sys
from types import MethodType

import pytest
import torch
from small_models import recast, scores_of, small_model
from test_fingerprint import lora
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference.fingerprint import AS_IT_IS, UnreadableReference, model_fingerprint
from bdpo_plugin.reference.scoring import ScoreRequest

IDS = torch.tensor([[5, 9, 300, 7, 41, 600, 8, 12]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def layer(model):
    return model.model.layers[0]


class Halved(modeling_qwen2.Qwen2MLP):
    def forward(self, hidden):
        return super().forward(hidden) / 2


class Rounded(nn.Linear):
    """As the layers of quantisation-aware training: the weights of a plain one."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, (self.weight * 4).round() / 4, self.bias)


class Halving:
    """A function that is an object."""

    def __call__(self, module, args, output):
        return output / 2


def half(function):
    def halved(*args, **kwargs):
        return function(*args, **kwargs) / 2

    return halved


def patched(module):
    module.forward = MethodType(half(type(module).forward), module)


def times(factor):
    return lambda module, args, output: output * factor


def fake_quantised(model, _):
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantization.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))


def liger(model, patch):
    apply = pytest.importorskip("liger_kernel.transformers").apply_liger_kernel_to_qwen2
    for name in ("Qwen2RMSNorm", "Qwen2MLP", "apply_rotary_pos_emb"):
        patch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))  # to be put back
    apply(fused_linear_cross_entropy=False, cross_entropy=False, rope=False, model=model)


def other_attention(model, patch):
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def sharper(module, query, *args, **kwargs):
        return sdpa(module, query * 3, *args, **kwargs)

    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", sharper)


def other_rotation(model, patch):
    def none(q, k, *args, **kwargs):
        return q, k

    patch.setattr(modeling_qwen2, "apply_rotary_pos_emb", none)


def reached_method(model, patch):
    """Of the class of a layer, which its forward calls by name."""

    class Apart(modeling_qwen2.Qwen2MLP):
        def forward(self, hidden):
            return self.scaled(super().forward(hidden))

        def scaled(self, hidden):
            return hidden

    recast(layer(model).mlp, Apart)
    before = model_fingerprint(model)
    patch.setattr(Apart, "scaled", half(Apart.scaled))
    assert model_fingerprint(model) != before


#: What changes numbers and neither weights nor the configuration on disk: the architecture, and
#: how a model of it is changed.
CHANGES = {
    "attention that leaves out a soft cap": (
        "soft-capped attention",
        lambda model, _: model.set_attn_implementation("eager"),
    ),
    "fake quantisation": ("tied", fake_quantised),
    "Liger": ("tied", liger),
    "an activation": ("tied", lambda model, _: setattr(layer(model).mlp, "act_fn", nn.ReLU())),
    "an activation that is no module": (
        "tied",
        lambda model, _: (
            delattr(layer(model).mlp, "act_fn"),
            setattr(layer(model).mlp, "act_fn", torch.tanh),
        ),
    ),
    "an epsilon": (
        "tied",
        lambda model, _: setattr(layer(model).input_layernorm, "variance_epsilon", 0.5),
    ),
    "the scale of attention": (
        "tied",
        lambda model, _: setattr(layer(model).self_attn, "scaling", 2.0),
    ),
    "the scale of the rotation": (
        "tied",
        lambda model, _: setattr(model.model.rotary_emb, "attention_scaling", 1.5),
    ),
    "a configuration in memory": (
        "soft-capped",
        lambda model, _: setattr(model.config, "final_logit_softcapping", 0.1),
    ),
    "a layer of another class": ("tied", lambda model, _: recast(layer(model).mlp, Halved)),
    "a layer that rounds": ("tied", lambda model, _: recast(layer(model).mlp.up_proj, Rounded)),
    "the forward of one layer": (
        "tied",
        lambda model, _: setattr(
            layer(model).mlp,
            "forward",
            MethodType(half(modeling_qwen2.Qwen2MLP.forward), layer(model).mlp),
        ),
    ),
    "the forward of a class": (
        "tied",
        lambda model, patch: patch.setattr(
            modeling_qwen2.Qwen2MLP, "forward", half(modeling_qwen2.Qwen2MLP.forward)
        ),
    ),
    "a function of a model's file": ("tied", other_rotation),
    "a function that a name of attention stands for": ("tied", other_attention),
    "a hook": ("tied", lambda model, _: layer(model).mlp.register_forward_hook(times(0.5))),
    "a hook before": (
        "tied",
        lambda model, _: layer(model).mlp.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    ),
    "a hook that is an object": (
        "tied",
        lambda model, _: layer(model).mlp.register_forward_hook(Halving()),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_numbers_changes_the_identity(tokenizer, monkeypatch, change):
    architecture, apply = CHANGES[change]
    options = {}
    if architecture == "soft-capped attention":
        architecture, options = "soft-capped", {"attn_logit_softcapping": 0.05}
    model = small_model(tokenizer, architecture, **options)
    with torch.no_grad():
        for parameter in layer(model).parameters():
            parameter.mul_(4)
    if "soft cap" in change and model.config._attn_implementation == "eager":
        pytest.skip("this release of transformers has no other attention for it")
    before, known = model_fingerprint(model), logits(model)
    apply(model, monkeypatch)
    found = model_fingerprint(model)
    assert found != before
    assert found == model_fingerprint(model)
    if change != "Liger":  # which differs by rounding
        assert not torch.allclose(logits(model), known, atol=1e-3)


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_what_a_patch_closes_over_counts(tokenizer, factor):
    def hooked(by):
        model = small_model(tokenizer)
        layer(model).mlp.register_forward_hook(times(by))
        return model_fingerprint(model)

    assert hooked(factor) == hooked(factor) != hooked(factor + 1)


def test_a_method_that_a_forward_calls_counts(tokenizer, monkeypatch):
    reached_method(small_model(tokenizer), monkeypatch)


def test_the_settings_of_multiplication_count(tokenizer):
    model = small_model(tokenizer)
    before = model_fingerprint(model)
    torch.set_float32_matmul_precision("medium")
    try:
        assert model_fingerprint(model) != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_releases_count(tokenizer, monkeypatch, package):
    model = small_model(tokenizer)
    before = model_fingerprint(model)
    monkeypatch.setattr(sys.modules[package], "__version__", "0.1")
    assert model_fingerprint(model) != before


def test_the_version_of_the_scoring_counts(tokenizer, monkeypatch):
    model = small_model(tokenizer)
    before = model_fingerprint(model)
    monkeypatch.setattr("bdpo_plugin.reference.fingerprint.VERSION", 10**6)
    assert model_fingerprint(model) != before


def test_the_strength_of_an_adapter_that_is_part_of_the_reference(tokenizer):
    def of(**options):
        torch.manual_seed(0)
        return model_fingerprint(lora(small_model(tokenizer), **options), adapter=AS_IT_IS)

    assert of() == of(lora_dropout=0.1) != of(lora_alpha=64)
    assert of() != of(use_rslora=True)
    assert of() != of(use_dora=True)


def test_the_settings_of_quantised_layers_count(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small_model(tokenizer, hidden_size=64).save_pretrained(tmp_path)

    def load(**options):
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    four, eight = load(load_in_4bit=True), load(load_in_8bit=True)
    before = model_fingerprint(four)
    layer(four).mlp.up_proj.compute_dtype = torch.bfloat16
    assert model_fingerprint(four) != before
    before = model_fingerprint(eight)
    layer(eight).mlp.up_proj.state.threshold = 1.0
    assert model_fingerprint(eight) != before


# --- what only wraps a model ------------------------------------------------------------------


def placed(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(layer(model), AlignDevicesHook("cpu", io_same_device=True))
    return model


def autocasting(model):
    """A reference of its own as accelerate prepares it: its identity tells of autocast apart."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # a process has one precision, which an earlier test may have chosen
    state: dict[str, object] = AcceleratorState._shared_state
    before = dict(state)
    state.clear()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        return accelerator.prepare_model(model, evaluation_mode=True)
    finally:
        state.clear()
        state.update(before)


def read(model):
    """Attention now takes the trees of packed rows."""
    jobs = [
        ScoreRequest(IDS[0, :3].numpy(), IDS[0, 3:].numpy()),
        ScoreRequest(IDS[0, :3].numpy(), IDS[0, 5:].numpy()),
    ]
    scores_of(model, jobs, reader=ResponseReader())
    return model


def trained(model):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable = MethodType(lambda self: None, model)  # as LLaMA-Factory
    model.config.use_cache = False
    return model


def frozen_for_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.prepare_model_for_kbit_training(model)


WRAPS = [placed, autocasting, read, trained, frozen_for_adapters, torch.compile]


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_only_wraps_a_model_does_not_count(tokenizer, wrap):
    before = model_fingerprint(small_model(tokenizer))
    assert model_fingerprint(wrap(small_model(tokenizer))) == before


def test_a_patch_under_a_placing_hook_counts(tokenizer):
    model = small_model(tokenizer)
    patched(layer(model).mlp)
    assert model_fingerprint(placed(model)) != model_fingerprint(small_model(tokenizer))


# --- what no words can be found for -----------------------------------------------------------


class Silent:
    __slots__ = ("what",)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda model: setattr(layer(model).mlp, "kernel", Silent()), "'kernel' cannot be read"),
        (lambda model: layer(model).mlp.register_forward_hook(times(Silent())), "Qwen2MLP"),
    ],
)
def test_what_shows_no_content_is_no_guess(tokenizer, give, words):
    model = small_model(tokenizer)
    give(model)
    with pytest.raises(UnreadableReference, match=f"{words}.*shows no content"):
        model_fingerprint(model)


# --- in every process ------------------------------------------------------------------------

MAKE = """
import sys
sys.path[:0] = {path!r}
import test_fingerprint_inputs
print(*test_fingerprint_inputs.of_every_kind())
"""


def of_every_kind():
    """Fingerprints of models with code of all kinds in them: sets, closures, decorators."""
    tokenizer = build_tokenizer()
    found = []
    for architecture in ("tied", "moe", "gpt2"):
        model = small_model(tokenizer, architecture)
        model.options = {"b", "a", "c"}
        model.register_forward_hook(times(1.5))
        found.append("-".join(model_fingerprint(model)))
    return found


@pytest.mark.slow
def test_another_process_finds_the_same():
    run = subprocess.run(
        [sys.executable, "-c", MAKE.format(path=sys.path)],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split()[-3:] == of_every_kind()
