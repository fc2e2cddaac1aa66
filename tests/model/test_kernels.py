"""The branches for a GPU, with stand-ins for its kernels: as the plain path, and taken."""

from dataclasses import replace

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash
from standin_kernels import flash_attn, installed, varlen
from test_tree_attention import assert_as_plain, gradients, lora_model, model_of, plain, read
from test_tree_attention import batch as batch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdpo_plugin.model import varlen_kernel
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.tree_attention import Tree

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3Text", "Qwen3Moe", "GPTNeoX"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Trees say where the segments of a row are, as a kernel wants it."""
    of = Tree.of.__func__

    def made(cls, groups, lengths, device):
        found = of(cls, groups, lengths, device)
        return replace(found, varlen=varlen_kernel.Varlen.of(found.sizes, found.before, device))

    monkeypatch.setattr(Tree, "of", classmethod(made))


@pytest.fixture
def calls():
    return []


@pytest.fixture
def kernel(monkeypatch, calls):
    """torch's, in a release; in float32 too, so that all can be compared to its digits."""

    def put(release):
        monkeypatch.setattr(varlen_kernel, "TORCH", varlen(release, calls))
        monkeypatch.setattr(varlen_kernel, "KERNEL_DTYPES", (torch.float32, torch.bfloat16))

    return put


@pytest.mark.parametrize("release", ["2.10", "2.11", "2.13"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_s_kernel(batch, kernel, calls, name, release):
    kernel(release)
    model = model_of(name, 90)
    assert_as_plain(model, batch)
    windowed = name in ("Mistral", "Gemma3Text")
    assert bool(calls) == (release != "2.10" or not windowed)  # whose kernel knows of no window


@pytest.mark.parametrize("window", [2, 12, 30])
def test_a_window_of_the_kernel(batch, kernel, calls, window):
    kernel("2.13")
    assert_as_plain(model_of("Mistral", 90, sliding_window=window), batch)
    assert {*calls} == {(window - 1, 0)}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_lora_and_layers_that_are_computed_again(batch, kernel, calls, checkpointing):
    kernel("2.13")
    assert_as_plain(lora_model(checkpointing=checkpointing), batch)
    assert calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_takes_the_kernel(batch, monkeypatch, calls, name, autocast):
    """Under autocast the states are float32, and rotary embeddings make the queries so."""
    monkeypatch.setattr(varlen_kernel, "TORCH", varlen("2.13", calls))
    model = model_of(name, 90)
    exact = gradients(model, plain(model, batch))
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, shape = read(ResponseReader(), model, batch)
        found, theirs = gradients(model, mine), gradients(model, plain(model, batch))
    assert calls
    assert shape[0] == 1
    if name == "Qwen3Moe":  # whose router chooses otherwise by a rounding
        return
    # no further from the exact gradients than the host's own path is, but for chance
    for key, gradient in exact.items():
        ours, own = ((x[key].float() - gradient).norm() for x in (found, theirs))
        assert ours <= 2 * own + 1e-3 * gradient.norm(), key


def test_what_the_kernel_cannot_goes_by_segments(batch, monkeypatch, calls):
    monkeypatch.setattr(varlen_kernel, "TORCH", varlen("2.13", calls))
    assert_as_plain(model_of("Llama", 90), batch)  # float32
    assert_as_plain(model_of("Llama", 90, hidden_size=48, head_dim=12), batch)
    monkeypatch.setattr(varlen_kernel, "TORCH", None)  # an older release
    assert_as_plain(model_of("Llama", 90), batch)
    assert not calls


@pytest.mark.skipif(
    transformers.__version__.startswith("5.6."),
    reason="its own flash function fails where a model has no attention sinks",
)
@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_4", "kernels-community/flash-attn2"]
)
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text", "Qwen3Moe"])
def test_transformers_flash_function_by_any_name(batch, monkeypatch, calls, architecture, name):
    installed(monkeypatch, flash_attn(calls))
    for variable in ("_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, variable, None, raising=False)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda *_: True)
    imports = flash._lazy_imports
    monkeypatch.setattr(flash, "_lazy_imports", lambda _, *a, **k: imports("flash_attention_2"))
    if name not in ALL_ATTENTION_FUNCTIONS:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_forward)
        mask = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, mask)
    model = model_of(architecture, 90)
    model.config._attn_implementation = name
    assert_as_plain(model, batch)
    assert calls
