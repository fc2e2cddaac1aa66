"""Rows that Axolotl would write as "None" or stop at are told with their numbers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets


def row(question="Why?", chosen="It is so.", rejected="No.", role="user"):
    return {
        "messages": [{"role": role, "content": question}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
    }


def test_rows_of_the_chat_template_strategy(refusal):
    rows = [row(str(i)) for i in range(8)]
    rows[1] = row(None)
    rows[3] = row(chosen=None)
    rows[4] = row(role="human")
    rows[5] = row() | {"rejected": []}
    rows[6] = row() | {"chosen": None}
    told = refusal(rows)
    assert "train.jsonl data cannot be trained on:" in told
    for words in (
        "1 of 8 rows: the `content` of a message of `messages` is None (rows 1)",
        "1 of 8 rows: the `content` of a message of `chosen` is None (rows 3)",
        "the `role` of a message of `messages` is 'human' (rows 4). Name it in the dataset's",
        "`rejected` is empty (rows 5)",
        "1 of 8 rows: `chosen` is None (rows 6). Remove these rows, or fill them in.",
    ):
        assert words in told


def test_rows_that_the_template_raises_at(refusal):
    template = "{{ raise_exception('No thanks.') if messages[0]['content'] == 'stop' else 'x\\n' }}"
    rows = [row(), row("stop")]
    told = refusal(rows, chat_template="jinja", chat_template_jinja=template)
    assert "1 of 2 rows: the dataset's `type` raises TemplateError: No thanks. (rows 1)" in told


def test_rows_of_text_strategies(refusal):
    rows = [{"question": "Why?", "chosen": "a", "rejected": "b", "system": None} for _ in range(4)]
    rows[2]["question"] = None
    told = refusal(rows, type="chatml.intel")
    assert "1 of 4 rows: `question` is None (rows 2)" in told
    assert "system" not in told
    told = refusal([{"question": "Why?", "chosen": "a"}], type="chatml.intel")
    assert "there is no `rejected`, only 'question', 'chosen' (rows 0). Name the columns so" in told
    told = refusal([{"prompt": "Why?", "chosen": "", "rejected": "a"}], type="passthrough")
    assert "1 of 1 rows: `chosen` is empty (rows 0)" in told
    told = refusal([{"prompt": "Why?", "chosen": "", "rejected": "a"}], type=None)
    assert "1 of 1 rows: `chosen` is empty (rows 0)" in told


def messages(*contents):
    return [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def test_messages_that_axolotl_would_write_as_python_does_or_take_by_position(refusal, loaded):
    """`chatml` and `llama3` write a list of messages as Python does, and of a conversation of four
    messages train on the second."""
    pair = {"prompt": "Why?", "chosen": messages("Why?", "So."), "rejected": messages("Why?", "No")}
    told = refusal([pair], type="chatml")
    assert "1 of 1 rows: `chosen` is a list, not text (rows 0)" in told
    assert "use `type: chat_template.default`" in told
    assert loaded([pair | {"messages": messages("Why?")}])["chosen"] == ["So.<|im_end|>"]
    long = {side: messages("Why?", "So.", "So?", side) for side in ("chosen", "rejected")}
    told = refusal(
        [{"prompt": "Why?", "chosen": 5, "rejected": "x"}], type={"field_prompt": "prompt"}
    )
    assert "`chosen` is a number, not text" in told
    for type in ("chatml.argilla_chat", "llama3.argilla_chat", "chatml.ultra"):
        told = refusal([{**long, "prompt": "Why?"}], type=type)
        assert "`chosen` is 4 messages, not a question and its answer (rows 0)" in told
        assert "Use `type: chat_template.argilla_chat`" in told
    assert loaded([long], type="chat_template.argilla_chat")["chosen"] == ["chosen<|im_end|>"]


def test_a_response_that_begins_with_other_messages_than_the_prompt(refusal, loaded, tmp_path):
    """As in UltraFeedback, whose column `messages` has the chosen answer too."""
    rows = [
        {
            "messages": messages("Why?", "So."),
            "chosen": messages("Why?", "So."),
            "rejected": messages("Why?", "No."),
        }
    ]
    told = refusal(rows)
    assert "`chosen` has messages before its last one that are not the end of `messages`" in told
    assert "Use `type: chat_template.argilla_chat`" in told
    found = loaded(rows, type="chat_template.argilla_chat")
    assert (found["chosen"], found["rejected"]) == (["So.<|im_end|>"], ["No.<|im_end|>"])
    assert found["prompt"][0].count("So.") == 0
    rows[0]["messages"] = messages("Why?")
    assert loaded(rows)["chosen"] == ["So.<|im_end|>"]
    rows[0]["rejected"] = messages("Who?", "No.")
    # Axolotl finds prepared data again by the file's name, whatever is in it by now
    anew = {"dataset_prepared_path": str(tmp_path / "anew")}
    told = refusal(rows, type="chat_template.argilla_chat", **anew)
    assert "`chosen` and `rejected` are answers to different messages (rows 0)" in told
    rows[0]["rejected"] = messages("Why?")
    assert "the last message of `rejected` is of the role 'user' (rows 0)" in refusal(rows, **anew)


@pytest.mark.parametrize("type", ["chat_template.default", "chatml.ultra"])
def test_good_rows_become_what_they_become_without_us(tiny, config, tmp_path, type):
    (given,) = tiny["datasets"]
    answers = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    if type == "chatml.ultra":
        rows = [{"prompt": "Why?", "chosen": answers, "rejected": answers, "system": None}]
        Path(given["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for rl in ("bdpo", "dpo"):
        places = {"dataset_prepared_path": str(tmp_path / rl), "rl": rl}
        keys = {**tiny, "datasets": [{**given, "type": type}], **places}
        data = load_preference_datasets(cfg=load_cfg(config(**keys)))
        made[rl] = data.train_dataset.to_list()
        if rl == "bdpo":
            numbers = [each.pop("bdpo_file_row") for each in made[rl]]
            assert sorted(numbers) == [str(number) for number in range(len(numbers))]
        made[rl] = sorted(map(json.dumps, made[rl]))  # Axolotl shuffles them
    assert made["bdpo"] == made["dpo"]
