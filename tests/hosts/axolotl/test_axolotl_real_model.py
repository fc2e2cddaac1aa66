"""Axolotl on a real chat model, SmolLM2-135M-Instruct, and real pairs: a short run, its scores."""

import json

import pytest
import torch

pytest.importorskip("axolotl")

import truth
from axolotl_runs import axolotl, write_config
from real_model import real_model
from real_runs import as_function, weights
from running import scores
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)


def prompt(question: str) -> str:
    """A question as the model was trained on it; the model's template is not asked."""
    return f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model():
    return real_model() / "model"


@pytest.fixture(scope="module")
def pairs():
    """The ten shortest of one question and its answers."""
    files = [real_model() / f"{split}.jsonl" for split in ("train", "eval")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in sorted(lines, key=len)]
    return [row for row in rows if len(row["messages"]) == 1][:10]


@pytest.fixture(scope="module")
def run(model, pairs, tmp_path_factory):
    """The output folder of two steps with LoRA, all ten pairs scored; and what Axolotl wrote."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = write_config(
        folder / "run.yml",
        folder,
        base_model=str(model),
        chat_template="tokenizer_default",
        shuffle_merged_datasets=False,
        sequence_len=512,
        micro_batch_size=1,
        max_steps=2,
        save_strategy="steps",
        saves_per_epoch=None,
        save_steps=2,
    )
    return folder / "run", axolotl("train", config, "--launcher", "python").stdout


def test_trains(run, model) -> None:
    folder, shown = run
    assert "10: 10 scored now, 0 reused" in shown
    assert "100.0% of the prompts begin and end so" in shown
    logged = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry for entry in logged if "loss" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert second["rewards/margins"] != first["rewards/margins"]
    assert sum("lora_B" in name for name in weights(folder)) == 30 * 7
    config = json.loads((model / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (49152, 30)
    assert config["tie_word_embeddings"] is True


def test_scores_of_ten_pairs(run, model, pairs) -> None:
    """To 1e-3 nats, from the texts and plain transformers in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    function = as_function(AutoModelForCausalLM.from_pretrained(model))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    saved = scores(run[0])
    assert saved["row"] == list(range(10))
    for i, pair in enumerate(pairs):
        question = pair["messages"][0]["content"].strip()
        answers = [ids(f"{pair[a]['content'].strip()}<|im_end|>") for a in ("chosen", "rejected")]
        true = truth.score_pair(function, ids(prompt(question)), ids(prompt("")), *answers)
        for name, value in true._asdict().items():
            assert saved[name][i] == pytest.approx(value, abs=1e-3), (i, name)


def test_tokenizer_and_template(model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == tokenizer.vocab_size == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    talk = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
    ]
    shown = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert shown == (
        f"{SYSTEM}<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *talk[:1]]
    assert "SmolLM" not in tokenizer.apply_chat_template(own, tokenize=False)
    # numbers digit by digit, and the blank line before a list's number as one token
    pieces = tokenizer.tokenize("So:\n\n1. 2023<|im_end|>")
    assert pieces == ["So", ":", "ĊĊ", "1", ".", "Ġ", "2", "0", "2", "3", "<|im_end|>"]
    text = "Zürich  日本 don't\n\n\n12.5 °C<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_answers_and_ends(model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    asked = tokenizer(prompt("What is the capital of France?"), return_tensors="pt")
    with torch.no_grad():
        answer = network.generate(**asked, max_new_tokens=40, do_sample=False)
    said = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    assert "Paris" in said
    assert said.endswith(".<|im_end|>")
