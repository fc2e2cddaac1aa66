"""Pairs that cannot teach are counted, shown and dropped; suspicious ones are shown."""

import re
from functools import partial

import pytest
from datasets import Dataset
from peft import LoraConfig
from running import history, pairs, scores, sharp_model, trainer
from transformers import GPT2Config, GPT2LMHeadModel

from bdpo_plugin import BDPOError
from bdpo_plugin.tiny import build_tokenizer


def shown(capsys):
    """The output, without the frames and line breaks of its tables."""
    return re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def test_pairs_that_cannot_teach_are_dropped(tmp_path, capsys):
    rows = pairs().to_list()
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[5]["rejected"] = rows[5]["chosen"]
    made = trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
    assert (
        "2 of 24 pairs of the train data: chosen and rejected are identical (dropped; rows 2, 5)"
        in shown(capsys)
    )
    assert scores(tmp_path)["row"] == [row for row in range(24) if row not in (2, 5)]
    assert len(made.train_dataset) == 22
    made.train()
    assert history(made, "loss")


def plain(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_empty_responses(tmp_path, capsys):
    tokenizer = build_tokenizer()
    rows = [plain(f"Question {i}?", f" answer {i}", " none") for i in range(6)]
    rows[4]["chosen"] = tokenizer.eos_token  # the end of sequence alone is a response
    made = trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
    assert len(made.train_dataset) == 6
    out = shown(capsys)
    assert "a response has no text, only special tokens (kept; rows 4)" in out

    conversations = pairs(6).to_list()
    # a template that renders nothing at all for an empty answer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['content'] %}",
    ).replace("{% if add", "{% if messages[-1]['role'] != 'assistant' and add")
    conversations[1]["chosen"][0]["content"] = ""
    made = trainer(
        output_dir=tmp_path, dataset=Dataset.from_list(conversations), tokenizer=tokenizer
    )
    assert "1 of 6 pairs of the train data: a response is empty (dropped; rows 1)" in shown(capsys)
    assert len(made.train_dataset) == 5


def test_truncation_that_leaves_no_response(tmp_path, capsys):
    rows = [plain(f"Question {i}? " * (40 if i == 3 else 1), "yes it is", "no") for i in range(6)]
    trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows), max_length=30)
    out = shown(capsys)
    assert "1 of 6 pairs of the train data: the prompt alone fills the sequence length" in out
    assert "(dropped; rows 3)" in out
    assert scores(tmp_path)["row"] == [0, 1, 2, 4, 5]


def test_a_boundary_that_the_tokenizer_moves(tmp_path, capsys):
    tokenizer = build_tokenizer()
    prompt, response = "how do I make the ca", "ke"
    together = tokenizer(prompt + response)["input_ids"]
    assert together[: len(tokenizer(prompt)["input_ids"])] != tokenizer(prompt)["input_ids"]
    rows = [plain(f"Question {i}?", " yes it is", " no") for i in range(5)]
    rows[1] = plain(prompt, response, response + " now")
    trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
    assert (
        "1 of 5 pairs of the train data: the prompt's tokens are not where the response begins "
        "(kept; rows 1)" in shown(capsys)
    )


def test_a_doubled_bos(tmp_path, capsys):
    tokenizer = build_tokenizer(bos=True)
    # a chat template that writes the BOS, as text, to a tokenizer that adds one
    render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
    rows = [
        plain(render(row["prompt"]), row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in pairs(5)
    ]
    trainer(
        output_dir=tmp_path,
        dataset=Dataset.from_list(rows),
        tokenizer=tokenizer,
        model=sharp_model(tokenizer),
    )
    out = shown(capsys)
    assert "5 of 5 pairs of the train data: the prompt begins with two BOS tokens (kept;" in out
    # the doubled BOS is what the prompts have before the user's turn
    assert "'<|bos|><|bos|><|im_start|>user" in out


@pytest.mark.parametrize("precompute", [True, False])
def test_no_room_for_the_null_prompt(tmp_path, precompute):
    """In a model with learned positions; before anything runs."""
    tokenizer = build_tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    )
    rows = [plain(f"{i}:", " answer" * 50, " none" * (40 + i)) for i in range(6)]
    words = r"the null prompt \(60 tokens\) and a response have up to 12\d tokens, .* for 64\..*"
    with pytest.raises(BDPOError, match=f"{words}`bdpo_null_prompt`") as refusal:
        trainer(
            output_dir=tmp_path,
            dataset=Dataset.from_list(rows),
            tokenizer=tokenizer,
            model=model,
            lora=LoraConfig(target_modules=["c_attn"]),
            max_length=64,
            bdpo_null_prompt=" none" * 30,
            bdpo_precompute=precompute,
        ).train()
    assert ("(rows 0, 1, 2, 3, 4, 5)" in str(refusal.value)) == precompute


def test_nothing_left(tmp_path):
    rows = pairs(4).to_list()
    for row in rows:
        row["rejected"] = row["chosen"]
    with pytest.raises(BDPOError, match=r"No pair of the train data.*4 of 4.*identical"):
        trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
