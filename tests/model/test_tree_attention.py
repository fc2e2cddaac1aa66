"""Attention by segments in a row with each beginning once: equal to the plain path, everywhere."""

import math

import pytest
import torch
import transformers
from small_models import small_model
from torch import nn

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.shared_prefix import pack, prefix_groups
from bdpo_plugin.model.traits import RowRules
from bdpo_plugin.model.tree_attention import ARGUMENT, PrefixGroup, Tree
from bdpo_plugin.model.varlen_kernel import Varlen

#: Configuration class -> its fields beside the usual ones. All windows are longer than a sequence.
ATTENDING = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 1},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 40},
    "Gemma2": {"head_dim": 16, "sliding_window": 40, "final_logit_softcapping": 0.5},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 40},
    "Phi3": {"bos_token_id": 1, "eos_token_id": 2},
    "Olmo2": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GPTNeoX": {},
}
#: Those in which more than attention passes from one position to the next.
MIXING = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "num_experts": 2,
    },
    "FalconMamba": {"state_size": 4},
}


def model_of(name, vocabulary, **options):
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
        }
        | {**ATTENDING, **MIXING}.get(name, {})
        | options
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


@pytest.fixture
def batch():
    """Three pairs, chosen rows first, of vocabulary 90; two of the prompts begin alike."""
    torch.manual_seed(3)
    prompts = [torch.randint(5, 90, (n,)) for n in (12, 9, 5)]
    prompts[1][:4] = prompts[0][:4]
    rows = [
        (p, torch.randint(5, 90, (n,)))
        for p, n in zip(prompts * 2, (7, 12, 3, 18, 1, 9), strict=True)
    ]
    ids, mask, positions = torch.zeros(3, 6, 30, dtype=torch.long)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end], mask[i, :end] = torch.cat([prompt, response]), 1
        positions[i, len(prompt) - 1 : end - 1] = 1
    positions = positions.bool()
    return {"input_ids": ids, "attention_mask": mask}, positions, ids.roll(-1, dims=1)[positions]


def read(reader, model, batch):
    """Log-probabilities; the shapes of the token ids that the model was given."""
    inputs, positions, labels = batch
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        return reader.token_statistics(model, positions, labels, **inputs)[0].logps, seen[-1]
    finally:
        handle.remove()


def plain(model, batch):
    inputs, positions, labels = batch
    logits = model(**inputs, use_cache=False).logits[positions].float()
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_plain(model, batch):
    """With a tree, as with all else the same; 1e-5 relative."""
    wanted = plain(model, batch)
    expected = gradients(model, wanted)
    reader = ResponseReader()
    mine, shape = read(reader, model, batch)
    assert shape == (1, int(batch[0]["attention_mask"].sum()) - 12 - 9 - 5)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    found = gradients(model, mine)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=limit, msg=name)


@pytest.mark.parametrize("name", ATTENDING)
def test_every_architecture(batch, name):
    model = model_of(name, 90)
    if model.config._attn_implementation == "eager":
        pytest.skip("this release of transformers has no SDPA for it")
    assert_as_plain(model, batch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_layers_that_are_computed_again(batch, options, tied):
    model = model_of("Llama", 90, tie_word_embeddings=tied).train()
    model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()
    assert_as_plain(model, batch)


def lora_model(*, checkpointing):
    """Ready for training."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = peft.get_peft_model(model_of("Qwen2", 90), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", [True, False])
def test_lora(batch, checkpointing):
    assert_as_plain(lora_model(checkpointing=checkpointing), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_keeps_its_padding(batch, name, dtype):
    model = model_of(name, 90).to(dtype)
    with torch.no_grad():
        _, shape = read(ResponseReader(), model, batch)
    assert shape == batch[0]["input_ids"].shape


@pytest.mark.parametrize("window", [2, 5, 12, 13, 29, 30])
@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text"])
def test_sequences_longer_than_a_window(batch, name, window):
    """Shorter than the beginnings, as long, within the responses, and no shorter than any."""
    assert_as_plain(model_of(name, 90, sliding_window=window), batch)


@pytest.mark.parametrize(("window", "shared"), [(60, True), (20, False)])
def test_a_window_that_is_not_told_to_attention(batch, window, shared):
    """Then what a layer sees is in a mask alone, which a row has none of: no sequence in it may be
    longer."""
    model, reader = model_of("Gemma3Text", 90, sliding_window=window), ResponseReader()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    mine, shape = read(reader, model, batch)
    torch.testing.assert_close(mine, plain(model, batch), rtol=1e-5, atol=1e-5)
    assert (shape == (1, int(batch[0]["attention_mask"].sum()) - 26)) == shared
    assert not reader.capabilities(model).rows.windows
    longer = {name: value.repeat(1, 3) for name, value in batch[0].items()}
    positions = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    positions[:, :-1] = longer["attention_mask"][:, 1:].bool()
    ids = longer["input_ids"].roll(-1, dims=1)[positions]
    mine, shape = read(reader, model, (longer, positions, ids))
    assert shape == (6, 90)
    torch.testing.assert_close(mine, plain(model, (longer, positions, ids)), rtol=1e-5, atol=1e-5)


def test_the_host_s_own_forward_is_as_before(batch):
    model = model_of("Llama", 90)
    wanted, inputs = plain(model, batch), batch[0]
    with torch.no_grad():
        text = model.generate(inputs["input_ids"][:1, :12], max_new_tokens=5, do_sample=False)
        read(ResponseReader(), model, batch)
        assert torch.equal(plain(model, batch), wanted)
        after = model.generate(inputs["input_ids"][:1, :12], max_new_tokens=5, do_sample=False)
    assert torch.equal(text, after)
    assert model.config._attn_implementation == "sdpa"


def test_no_tensor_grows_with_the_square_of_the_row(tokenizer):
    """32 sequences of 16 tokens: a mask of the row's length squared would have 262,144 elements."""
    from test_reader import Largest

    model = small_model(tokenizer)
    ids = torch.randint(5, len(tokenizer), (32, 16))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 7] = True
    labels = ids[:, 8]
    reader = ResponseReader(chunk_elements=8 * len(tokenizer))
    inputs = {"input_ids": ids, "attention_mask": mask}
    reader.token_statistics(model, positions, labels, **inputs)
    with Largest() as seen:
        reader.token_statistics(model, positions, labels, **inputs)
    assert seen.numel <= 504 * 96  # the width of the feed-forward layers


def test_the_segments_for_a_kernel_are_those_of_the_loop():
    """What a kernel would do with the lengths and keys that it is given, computed by hand."""
    groups = [PrefixGroup((0, 2, 3), 4), PrefixGroup((1,)), PrefixGroup((4, 5), 2)]
    lengths = [7, 5, 4, 9, 3, 6]
    tree = Tree.of(groups, lengths, torch.device("cpu"))
    assert tree.sizes == [7, 0, 5, 5, 3, 4]
    width = sum(tree.sizes)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, width, 8)

    class Layer(nn.Module):
        is_causal = True

    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    mine, _ = attend(Layer(), query, key, value, None, **{ARGUMENT: tree})

    keys, ends = Varlen.of(tree.sizes, tree.before, torch.device("cpu"))
    bounds = [ends[f"cu_seq_lens_{kind}"].tolist() for kind in "qk"]
    assert [b[-1] for b in bounds] == [width, len(keys)]
    assert (ends["max_length_q"], ends["max_length_k"]) == (7, 9)
    parts = []
    for a, b, c, d in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        scores = query[:, :, a:b] @ key[:, :, keys[c:d]].mT / 8**0.5
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(weights @ value[:, :, keys[c:d]])
    wanted = torch.cat(parts, dim=2).transpose(1, 2)
    torch.testing.assert_close(mine, wanted)


def test_positions_begin_again_after_the_prompt(batch):
    inputs, positions, labels = batch
    mask = inputs["attention_mask"].bool()
    rules = RowRules(widest=math.inf, longest=math.inf, each_once=False)
    groups = prefix_groups(inputs["input_ids"], mask)
    where, packed, order = pack(positions, inputs, mask, groups, rules)
    row, places = packed["input_ids"][0], packed["position_ids"][0]
    tree = packed[ARGUMENT]
    starts = torch.tensor([0, *tree.sizes]).cumsum(0)[:-1].tolist()
    assert [int(places[start]) for start in starts] == tree.before
    assert len(row) == sum(tree.sizes)
    assert where.sum() == len(set(order.tolist())) == len(labels) - 3  # each prompt's last token
