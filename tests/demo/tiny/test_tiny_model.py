"""The tiny model's tokenizer and weights, as a host will find them on disk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig, Qwen2Config

from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs

CONFIGS = [Qwen2Config, LlamaConfig, Gemma2Config]


def render(tokenizer, pair) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the whole chat with the chosen answer."""
    prompt = tokenizer.apply_chat_template(
        pair["messages"], add_generation_prompt=True, tokenize=False
    )
    chat = tokenizer.apply_chat_template([*pair["messages"], pair["chosen"]], tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, chat))


@given(st.text())
def test_any_text_comes_back(text) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("bos", [False, True])
def test_a_response_follows_its_prompt_and_ends_in_one_eos(bos) -> None:
    tokenizer = build_tokenizer(bos=bos)
    for pair in preference_pairs(16):
        prompt, chat = render(tokenizer, pair)
        assert chat[: len(prompt)] == prompt
        assert tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
        response = chat[len(prompt) :]
        assert response.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(response) == pair["chosen"]["content"] + "<|im_end|>\n"
        assert prompt.count(tokenizer.bos_token_id) == int(bos)


def test_a_rendered_chat_gets_a_second_bos_from_the_tokenizer_as_with_llama() -> None:
    tokenizer = build_tokenizer(bos=True)
    text = tokenizer.apply_chat_template(preference_pairs(2)[0]["messages"], tokenize=False)
    assert tokenizer(text).input_ids[:2] == [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_saved_tokenizer_is_the_same_beside_any_model(config, bos, tmp_path) -> None:
    tokenizer = build_tokenizer(bos=bos)
    build_model(tokenizer, config=config, hidden_size=16, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded, special) == getattr(tokenizer, special)
    for pair in preference_pairs(8):
        assert render(loaded, pair) == render(tokenizer, pair)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_architecture_tied_or_not(config, tied) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config=config, hidden_size=32, tie_word_embeddings=tied)
    assert isinstance(model.config, config)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, len(tokenizer))
    assert logits.dtype == torch.float32


def test_weights_depend_on_the_seed_alone() -> None:
    tokenizer = build_tokenizer()
    state = torch.get_rng_state()
    first, again, other = (build_model(tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
