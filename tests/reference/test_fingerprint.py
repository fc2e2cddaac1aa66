"""The fingerprint tells references apart by what their log-probabilities depend on, and by that
alone."""

import copy
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import ARCHITECTURES, small_model
from torch import nn
from transformers import AutoModelForCausalLM

from bdpo_plugin.demo.tiny import build_model, build_tokenizer
from bdpo_plugin.reference.fingerprint import model_fingerprint, tokenizer_fingerprint


class Config:
    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self):
        return self.fields


class Bare(nn.Module):
    """A model of the given buffers, which may have any dtype and shape."""

    def __init__(self, *tensors, **fields):
        super().__init__()
        self.config = Config(**fields)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"b{i}", tensor)


def of(*tensors, **fields):
    return model_fingerprint(Bare(*tensors, **fields))


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_and_buffer_counts(tokenizer, architecture):
    model = small_model(tokenizer, architecture)
    before = model_fingerprint(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for index in (0, -1):
            old = tensor.data.view(-1)[index].item()
            tensor.data.view(-1)[index] += 1
            assert model_fingerprint(model) != before, (name, index)
            tensor.data.view(-1)[index] = old
    assert model_fingerprint(model) == before


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 9000),
    at=st.integers(0, 8999),
    bit=st.integers(0, 7),
    offset=st.integers(0, 9),
)
def test_any_bit_counts_wherever_the_tensor_lies(dtype, size, at, bit, offset):
    width = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(0, 2, (size * width,), dtype=torch.uint8, generator=generator)
    storage = torch.zeros((offset + size) * width, dtype=torch.uint8)
    storage[offset * width :] = raw
    shifted = storage.view(dtype)[offset:]
    assert of(raw.view(dtype)) == of(shifted)
    changed = raw.clone()
    changed[at % len(raw)] ^= 1 if dtype == torch.bool else 1 << bit
    assert of(raw.view(dtype)) != of(changed.view(dtype))


@given(first=st.integers(0, 4999), second=st.integers(0, 4999), size=st.integers(2, 5000))
def test_the_place_of_a_word_counts(first, second, size):
    first, second = first % size, second % size
    words = torch.arange(size)
    swapped = words.clone()
    swapped[[first, second]] = words[[second, first]]
    assert (of(words) == of(swapped)) == (first == second)


def test_across_the_blocks_of_the_hash(monkeypatch):
    from bdpo_plugin.reference import digests

    monkeypatch.setattr(digests, "_BLOCK", 2 * digests._WIDTH)
    words = torch.arange(5 * digests._WIDTH + 17)
    seen = {of(words)}
    for at in range(0, len(words), 1000):
        changed = words.clone()
        changed[at] += 1
        seen.add(of(changed))
    assert len(seen) == 1 + len(range(0, len(words), 1000))


def test_shape_dtype_and_order_count():
    ones = torch.ones(2, 3)
    variants = [
        (ones,),
        (ones.view(3, 2),),
        (ones.view(6),),
        (ones.view(torch.int32),),
        (ones, ones.clone()),
        (torch.zeros(2, 3), ones),
        (ones, torch.zeros(2, 3)),
        (torch.tensor(1.0),),
        (torch.tensor(True),),
        (torch.tensor(False),),
        (torch.empty(0),),
        (),
    ]
    assert len({of(*tensors) for tensors in variants}) == len(variants)


def test_memory_layout_does_not_count():
    tensor = torch.randn(6, 5)
    assert of(tensor) == of(tensor.t().contiguous().t()) == of(torch.cat([tensor, tensor])[:6])


def test_dtype_and_compute_dtype(model):
    before = model_fingerprint(model)
    assert model_fingerprint(model, compute="bf16") != before
    assert model_fingerprint(model, compute="fp16") != model_fingerprint(model, compute="bf16")
    assert model_fingerprint(copy.deepcopy(model).bfloat16()) != before


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("num_attention_heads", 4), ("rope_theta", 500.0)],
)
def test_a_configuration_value_counts(tokenizer, model, field, value):
    before = model_fingerprint(model)
    if field == "rope_theta":
        parameters = getattr(model.config, "rope_parameters", None) or model.config.rope_scaling
        parameters["rope_theta"] = value
    else:
        setattr(model.config, field, value)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_name_or_path", "/elsewhere/model"),
        ("pad_token_id", 7),
        ("use_cache", False),
        ("architectures", ["Qwen2ForCausalLM"]),
        ("transformers_version", "5.0.0"),
    ],
)
def test_what_changes_no_number_does_not_count(model, field, value):
    before = model_fingerprint(model)
    setattr(model.config, field, value)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_weights_loaded_from_two_places(tokenizer, tmp_path, architecture):
    model = small_model(tokenizer, architecture)
    for place in ("here", "there"):
        model.save_pretrained(tmp_path / place)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32)
        for place in ("here", "there")
    ]
    assert loaded[0].config._name_or_path != loaded[1].config._name_or_path
    assert len({model_fingerprint(m) for m in (model, *loaded)}) == 1


def test_running_training_and_freezing_do_not_count(model):
    before = model_fingerprint(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert model_fingerprint(model) == before


def lora(model, **options):
    peft = pytest.importorskip("peft")
    defaults = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **options}))


@pytest.mark.parametrize("architecture", ["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 8, "lora_alpha": 64},
        {"target_modules": ["v_proj", "down_proj"], "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"use_dora": True, "init_lora_weights": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [3, 4]},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_the_base_model_under_any_adapter(tokenizer, architecture, options):
    base = model_fingerprint(small_model(tokenizer, architecture))
    wrapped = lora(small_model(tokenizer, architecture), **options)
    assert model_fingerprint(wrapped) == base
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
            assert model_fingerprint(wrapped) == base, name
    with wrapped.disable_adapter():
        assert model_fingerprint(wrapped) == base


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "ia3", "vera"])
def test_the_base_model_under_other_adapters(tokenizer, kind):
    peft = pytest.importorskip("peft")
    config = {
        "prompt_tuning": lambda: peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
        "ia3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    }[kind]()
    model = small_model(tokenizer)
    base = model_fingerprint(model)
    assert model_fingerprint(peft.get_peft_model(model, config)) == base


def test_the_base_weights_count_under_an_adapter(model):
    wrapped = lora(model)
    before = model_fingerprint(wrapped)
    model.model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] += 1
    assert model_fingerprint(wrapped) != before


def test_the_reference_adapter_counts(tokenizer):
    peft = pytest.importorskip("peft")

    def with_reference(**options):
        torch.manual_seed(0)
        model = lora(small_model(tokenizer), modules_to_save=["norm"])
        defaults = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
        torch.manual_seed(1)
        model.add_adapter(
            "ref", peft.LoraConfig(**{**defaults, "modules_to_save": ["norm"], **options})
        )
        return model

    model = with_reference()
    before = model_fingerprint(model, adapter="ref")
    assert model_fingerprint(with_reference(), adapter="ref") == before
    assert model_fingerprint(model) == model_fingerprint(small_model(tokenizer)) != before
    for name, parameter in model.named_parameters():
        if ".default." in name or ".ref." in name:
            parameter.data.add_(1)
            now = model_fingerprint(model, adapter="ref")
            assert (now != before) == (".ref." in name), name
            before = now
    # the same matrices, at another strength
    original = model_fingerprint(with_reference(), adapter="ref")
    assert model_fingerprint(with_reference(lora_alpha=64), adapter="ref") != original
    assert model_fingerprint(with_reference(use_rslora=True), adapter="ref") != original


@pytest.fixture
def quantised(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    small_model(tokenizer, hidden_size=64).save_pretrained(tmp_path)

    def load(**options):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
        )

    return load


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}


def test_quantised_models(quantised):
    seen = set()
    for options in (
        FOUR_BITS,
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},
    ):
        model = quantised(**options)
        before = model_fingerprint(model)
        assert model_fingerprint(quantised(**options)) == before
        wrapped = lora(model, target_modules="all-linear")
        wrapped.train()
        wrapped(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        assert model_fingerprint(wrapped) == before
        seen.add(before)
    assert len(seen) == 4


def test_the_scales_of_4_bit_weights_count(quantised):
    model = quantised(**FOUR_BITS)
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    seen = {model_fingerprint(model)}
    for scale in (state.absmax, state.offset, state.state2.absmax, state.code):
        scale.view(-1)[-1:] += 1
        seen.add(model_fingerprint(model))
    assert len(seen) == 5


@pytest.mark.parametrize("used", [False, True])
def test_the_scales_of_8_bit_weights_count(quantised, used):
    model = quantised(load_in_8bit=True)
    layer = model.model.layers[0].mlp.down_proj
    if used:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    before = model_fingerprint(model)
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    scale[-1] *= 2
    assert model_fingerprint(model) != before


def test_tokenizers():
    first = build_tokenizer()
    before = tokenizer_fingerprint(first)
    assert tokenizer_fingerprint(build_tokenizer()) == before
    assert tokenizer_fingerprint(build_tokenizer(vocab_size=600)) != before
    first.add_tokens(["<tool>"])
    assert tokenizer_fingerprint(first) != before


def test_speed_is_printed():
    """Seconds for a 7B model, not minutes: `pytest -s` says what it is here."""
    weights = torch.randn(2**24)
    model = Bare(weights)
    start = time.perf_counter()
    before = model_fingerprint(model)
    seconds = time.perf_counter() - start
    print(f"\nfingerprint: {weights.nbytes / seconds / 1e9:.1f} GB/s on the CPU")
    weights[-1] += 1
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_column_counts(tokenizer, dtype):
    model = build_model(tokenizer).to(dtype)
    weight = model.model.layers[0].mlp.down_proj.weight
    original = model_fingerprint(model)
    with torch.no_grad():
        for columns in ([0], [0, 1], [5, 9]):
            for factor in (-1, 2):
                kept = weight.detach().clone()
                weight[:, columns] *= factor
                assert model_fingerprint(model) != original, (columns, factor)
                weight.copy_(kept)
    assert model_fingerprint(model) == original
