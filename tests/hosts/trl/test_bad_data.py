"""Pairs that cannot teach are counted, shown and dropped; suspicious ones are shown."""

import re
from functools import partial

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from running import history, pairs, scores, sharp_model, trainer
from transformers import GPT2Config, GPT2LMHeadModel

from bdpo_plugin import BDPOError
from bdpo_plugin.demo.tiny import build_tokenizer


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

    def run(**options):
        trainer(
            output_dir=tmp_path,
            dataset=Dataset.from_list(rows),
            tokenizer=tokenizer,
            model=model,
            lora=LoraConfig(target_modules=["c_attn"]),
            max_length=64,
            max_steps=1,
            bdpo_null_prompt=" none" * 30,
            bdpo_precompute=precompute,
            **options,
        ).train()

    with pytest.raises(BDPOError, match=f"{words}`bdpo_null_prompt`") as refusal:
        run()
    assert ("(rows 0, 1, 2, 3, 4, ...)" in str(refusal.value)) == precompute
    run(bdpo_alpha=0)  # which does not run it


def test_nothing_left(tmp_path):
    rows = pairs(4).to_list()
    for row in rows:
        row["rejected"] = row["chosen"]
    with pytest.raises(BDPOError, match=r"No pair of the train data.*4 of 4.*identical"):
        trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))


# What is no pair at all -----------------------------------------------------------------------


def refusal(tmp_path, rows, **options):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    with pytest.raises(BDPOError) as raised:
        trainer(output_dir=tmp_path, dataset=dataset, **options)
    return str(raised.value)


def test_all_bad_rows_are_told_at_once(tmp_path):
    rows, evaluation = pairs(8).to_list(), pairs(4).to_list()
    rows[1]["chosen"] = rows[5]["chosen"] = None
    rows[3]["prompt"][0]["content"] = None
    rows[4]["rejected"][0]["role"] = None
    evaluation[2]["rejected"] = None
    told = refusal(tmp_path, rows, evaluation=Dataset.from_list(evaluation))
    assert told.splitlines() == [
        "The train data cannot be trained on:",
        "- 2 of 8 rows: `chosen` is None (rows 1, 5). Remove these rows, or fill them in.",
        "- 1 of 8 rows: the `content` of a message of `prompt` is None (rows 3). Remove these "
        "rows, or fill them in.",
        "- 1 of 8 rows: the `role` of a message of `rejected` is None (rows 4). Write 'user' or "
        "'assistant', say.",
        "The eval data cannot be trained on:",
        "- 1 of 4 rows: `rejected` is None (rows 2). Remove these rows, or fill them in.",
        "Nothing has been computed.",
    ]
    assert not (tmp_path / "bdpo").exists()


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "It has no rows"),
        ([plain("a", "b", "c")], "of type list: make a dataset of it"),
        (DatasetDict(train=pairs(4)), "of type DatasetDict: choose one of its splits"),
        (pairs(4).remove_columns("rejected"), "4 of 4 rows: there is no `rejected`"),
        (pairs(4).rename_columns({"chosen": "accepted"}), "only 'prompt', 'accepted', 'rejected'"),
        (Dataset.from_list([plain("a", 1, 2)] * 3), "`chosen` is a number"),
        (Dataset.from_list([{**row, "prompt": "a"} for row in pairs(2)]), "`prompt` is text"),
        (IterableDataset.from_generator(lambda: iter(())), "It has no rows"),
    ],
    ids=["no rows", "list", "splits", "missing", "renamed", "numbers", "forms", "empty stream"],
)
def test_data_that_is_no_pairs(tmp_path, dataset, words):
    with pytest.raises(BDPOError, match=re.escape(words)):
        trainer(output_dir=tmp_path, dataset=dataset, bdpo_precompute=False)


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    rows = [plain(f"Question {i}?", " yes", " no") for i in range(4)]
    told = refusal(tmp_path, rows, tokenizer=tokenizer)
    assert "The tokenizer has no EOS token" in told
    assert "`tokenizer.eos_token`" in told
    tokenizer.pad_token = None
    told = refusal(tmp_path, pairs(4), tokenizer=tokenizer)
    assert "neither a padding token nor an EOS token" in told


def test_rows_that_the_template_raises_at(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] == 'critic' %}"
        "{{ raise_exception('No critic here.') }}{% endfor %}" + tokenizer.chat_template
    )
    rows = pairs(6).to_list()
    rows[2]["prompt"][-1]["role"] = rows[5]["prompt"][-1]["role"] = "critic"
    told = refusal(tmp_path, rows, tokenizer=tokenizer)
    assert "2 of 6 rows: the chat template or tokenizer raises TemplateError" in told
    assert (
        "No critic here. (rows 2, 5). If these are all rows, choose another chat template" in told
    )
    told = refusal(tmp_path, stream(rows), tokenizer=tokenizer, bdpo_precompute=False)
    assert "Row 2 of the train data, a stream, cannot be trained on: the chat template" in told
    tokenizer.chat_template = None
    assert "6 of 6 rows: the chat template" in refusal(tmp_path, pairs(6), tokenizer=tokenizer)


def test_responses_without_a_message_are_dropped(tmp_path, capsys):
    rows = pairs(6).to_list()
    rows[0]["chosen"] = rows[4]["rejected"] = []
    # two columns by which TRL would take conversations for text
    rows = [{**row, "messages": "a", "completion": "b"} for row in rows]
    made = trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
    assert "2 of 6 pairs of the train data: a response is empty (dropped; rows 0, 4)" in shown(
        capsys
    )
    assert scores(tmp_path)["row"] == [1, 2, 3, 5]
    made.evaluate(Dataset.from_list(rows[3:]))
    assert "1 of 3 pairs of the eval data: a response is empty (dropped; rows 1)" in shown(capsys)
    with pytest.raises(BDPOError, match=r"eval data.*\n- 1 of 2 rows: `chosen` is None \(rows 1\)"):
        made.evaluate(Dataset.from_list([rows[1], {**rows[2], "chosen": None}]))


# Streams --------------------------------------------------------------------------------------


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def useless():
    """Pairs that cannot teach, and the position of each among good ones."""
    rows = pairs(16).to_list()
    long = [{"role": "user", "content": "river stone " * 60}]
    rows[2] = {**rows[2], "chosen": []}
    rows[5] = {**rows[5], "prompt": long}
    rows[9] = {**rows[9], "rejected": rows[9]["chosen"]}
    rows[13] = {**rows[13], "prompt": long}
    return rows


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_stream_is_filtered_as_it_comes(tmp_path, capsys, mode):
    rows = useless()
    options = {"bdpo_precompute": False, "max_length": 100, "truncation_mode": mode}
    made = trainer(
        output_dir=tmp_path, dataset=stream(rows), evaluation=stream(rows[8:]), **options
    )
    out = shown(capsys)
    assert "a pair of the train data, a stream (row 2): a response is empty (dropped;" in out
    if mode == "keep_start":
        assert "(row 5): no token of a response is left after truncation (dropped;" in out
    assert "(row 9): chosen and rejected are identical (dropped;" in out
    made.train()
    assert len(history(made, "loss")) == 4
    out = shown(capsys)
    assert "pairs read from the train data, a stream: chosen and rejected are identical" in out
    made.evaluate()
    good = [row for i, row in enumerate(rows) if i not in (2, 9)]
    if mode == "keep_start":
        good = [row for row in good if "river" not in row["prompt"][0]["content"]]
    other = trainer(output_dir=tmp_path, dataset=Dataset.from_list(good), **options)
    assert ids(made.train_dataset) == ids(other.train_dataset)


def ids(dataset, count=4):
    return [row["prompt_ids"] + row["chosen_ids"] for row in dataset.take(count)]


def test_workers_count_what_they_filter(tmp_path, capsys):
    made = trainer(
        output_dir=tmp_path,
        dataset=stream(useless()),
        bdpo_precompute=False,
        max_length=100,
        max_steps=2,
        dataloader_num_workers=1,
    )
    shown(capsys)
    made.train()
    assert re.search(
        r"2 of the \d+ pairs read from the train data, a stream: no token .* \(dropped\)",
        shown(capsys),
    )


@pytest.mark.parametrize("position", [1, 300])
def test_a_bad_row_of_a_stream_is_named(tmp_path, position):
    rows = (pairs(16).to_list() * 20)[: position + 1]
    rows[position] = {**rows[position], "chosen": [{"role": "assistant", "content": "\ud800"}]}

    def run():
        trainer(
            output_dir=tmp_path,
            dataset=stream(rows),
            model=sharp_model(hidden_size=32, layers=1),
            bdpo_precompute=False,
            per_device_train_batch_size=16,
            max_steps=100,
        ).train()

    with pytest.raises(BDPOError, match=rf"Row {position} of the train data, a stream.*surrogate"):
        run()


def test_a_stream_of_which_nothing_is_left(tmp_path):
    rows = [{**row, "rejected": row["chosen"]} for row in pairs(4)]
    with pytest.raises(BDPOError, match=r"No pair of the train data, a stream"):
        trainer(output_dir=tmp_path, dataset=stream(rows), bdpo_precompute=False)
