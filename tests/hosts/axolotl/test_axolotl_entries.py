"""Keys of an entry of `datasets` that Axolotl drops: given back, or refused with a remedy.

A remedy is followed here wherever one is printed.
"""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets

from bdpo_plugin.hosts.axolotl.entries import check_entries
from bdpo_plugin.settings import BDPOError


def renamed(question="Is it?", chosen="It is.", rejected="No."):
    return {
        "conv": [{"from": "human", "value": question}],
        "good": {"from": "gpt", "value": chosen},
        "bad": {"from": "gpt", "value": rejected},
    }


FIELDS = {"field_messages": "conv", "field_chosen": "good", "field_rejected": "bad"}
MAPPED = {"message_property_mappings": {"role": "from", "content": "value"}}
ROLES = {"roles": {"user": ["human"], "assistant": ["gpt"]}}
MADE = {
    "prompt": "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
    "chosen": "It is.<|im_end|>",
    "rejected": "No.<|im_end|>",
}


def texts(dataset):
    return {column: dataset[column][0] for column in MADE}


def test_each_advice_leads_to_the_next_and_then_to_a_run(refusal, loaded):
    """Keys and roles of the user's own, which Axolotl's schema drops."""
    told = refusal([renamed()], entry={"field_messages": "messages"})
    assert "there is no `messages`, only 'conv', 'good', 'bad' (rows 0). Name it in the" in told
    told = refusal(entry=FIELDS)
    assert "has no `role` (its keys: 'from', 'value') (rows 0)" in told
    assert "Name it in the dataset's `message_property_mappings`, which says `{role: role, " in told
    told = refusal(entry=FIELDS | MAPPED)
    assert "the `from` of a message of `conv` is 'human' (rows 0). Name it in the" in told
    assert "`roles`, which say `{user: [user], assistant: [assistant], system: [system]" in told
    assert texts(loaded(entry=FIELDS | MAPPED | ROLES)) == MADE
    text = [{"conv": "Is it?", "good": "It is.", "bad": "No."}]
    told = refusal(text, entry=FIELDS | ROLES)
    assert "`conv` is text, which Axolotl takes for a message of the role 'user' (rows 0)" in told
    assert texts(loaded(text, entry=FIELDS)) == MADE


def test_template_and_type_of_file_of_an_entry(loaded, tmp_path, tiny):
    row = {"messages": "Is it?", "chosen": "It is.", "rejected": "No."}
    made = loaded([row], entry={"chat_template": "phi_3"}, chat_template="chatml")
    assert made["chosen"] == ["It is.<|end|>"]
    # Axolotl knows its folder of prepared data by the keys that it has kept
    mine = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    assert loaded(entry={"chat_template_jinja": mine})["prompt"] == ["Is it?|"]
    Path(tmp_path / "rows.csv").write_text(json.dumps(row) + "\n")  # which Axolotl takes for CSV
    made = loaded(entry={"path": str(tmp_path / "rows.csv"), "ds_type": "json", "name": "mine"})
    assert texts(made) == MADE


def test_prepared_data_of_plain_dpo_is_not_taken(loaded):
    """Nobody has looked at its responses."""
    row = {"messages": "Is it?", "chosen": "me", "rejected": "No."}
    assert loaded([row], rl="dpo")["chosen"] != ["me<|im_end|>"]
    assert loaded(bdpo_alpha=0)["chosen"] == ["me<|im_end|>"]
    assert loaded(bdpo_alpha=1)["bdpo_file_row"] == ["0"]  # from the folder


def test_evaluation_sets_are_read_by_their_own_keys(tiny, config, tmp_path):
    """Axolotl reads them by those of the entry of `datasets` in the same position."""
    for name, row in (("eval", renamed()), ("other", renamed(chosen="So."))):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    entry = {"ds_type": "json", "type": "chat_template.default"} | FIELDS | MAPPED | ROLES
    paths = [{**entry, "path": str(tmp_path / f"{name}.jsonl")} for name in ("eval", "other")]
    data = load_preference_datasets(cfg=load_cfg(config(**tiny, test_datasets=paths)))
    assert sorted(data.eval_dataset["chosen"]) == ["It is.<|im_end|>", "So.<|im_end|>"]
    assert sorted(data.eval_dataset["bdpo_file_row"]) == [f"0 of {p['path']}" for p in paths]
    assert len(data.train_dataset) == 4
    # what it does not say is that of the other, as in Axolotl
    (tmp_path / "train.jsonl").write_text(json.dumps(renamed()) + "\n")
    training = {**tiny["datasets"][0], **FIELDS, **MAPPED, **ROLES}
    bare = {key: paths[1][key] for key in ("path", "type")}
    keys = {**tiny, "datasets": [training], "test_datasets": [bare]}
    data = load_preference_datasets(cfg=load_cfg(config(**keys)))
    assert data.eval_dataset["chosen"] == ["So.<|im_end|>"]


CHAT = {"path": "x", "type": "chat_template.default"}
REFUSED = {
    "typing error": (
        {**CHAT, "field_mesages": "conv"},
        "`datasets[0].field_mesages` has no effect: Axolotl's preference training drops it. Did "
        "you mean `field_messages`?",
        {**CHAT, "field_messages": "conv"},
    ),
    "of nothing known": (
        {**CHAT, "wxyz": 1},
        "`datasets[0].wxyz` has no effect: Axolotl's preference training drops it. Remove it.",
        CHAT,
    ),
    "of another type": (
        {"path": "x", "type": "chatml.intel", "field_messages": "conv"},
        "`datasets[0].field_messages: conv` has no effect: `type: chatml.intel` does not read it. "
        "Remove it, or write a `type` that reads it: `chat_template.default`.",
        {**CHAT, "field_messages": "conv"},
    ),
    "of no type": (
        {"path": "x", "roles": {"user": ["human"]}},
        "has no effect: no `type` does not read it. Remove it, or write",
        {**CHAT, "roles": {"user": ["human"]}},
    ),
    "beside a mapping": (
        {"path": "x", "type": {"field_prompt": "q"}, "field_chosen": "good"},
        "a `type` that is a mapping does not read it. Write `field_chosen` into the mapping",
        {"path": "x", "type": {"field_prompt": "q", "field_chosen": "good"}},
    ),
    "in a mapping": (
        {"path": "x", "type": {"field_prompt": "q", "promt_format": "{prompt}"}},
        "`datasets[0].type.promt_format` has no effect: Axolotl's preference training drops it. "
        "Did you mean `prompt_format`?",
        {"path": "x", "type": {"field_prompt": "q", "prompt_format": "{prompt}"}},
    ),
    "argilla": (
        {"path": "x", "type": "chat_template.argilla_chat", "field_messages": "conv"},
        "`type: chat_template.argilla_chat` does not read it",
        {"path": "x", "type": "chat_template.argilla_chat", "field_chosen": "good"},
    ),
    "names": (
        {**CHAT, "name": ["a", "b"]},
        "`datasets[0].name: ['a', 'b']` cannot be used: Axolotl's preference training takes one",
        {**CHAT, "name": "a"},
    ),
    "no system message": (
        {**CHAT, "drop_system_message": True},
        "`datasets[0].drop_system_message: True` has no effect with `rl: bdpo`",
        {**CHAT, "drop_system_message": False},
    ),
    "thinking": ({**CHAT, "split_thinking": True}, "no more than roles and contents", CHAT),
    "tools": ({**CHAT, "field_tools": "t"}, "no more than roles and contents", CHAT),
    "shards": (
        {**CHAT, "shards": 2},
        "Take a part by `split: train[:50%]`.",
        {**CHAT, "split": "train[:50%]"},
    ),
    "no end of a turn": (
        {**CHAT, "train_on_eos": "none"},
        "`datasets[0].train_on_eos: none` has no effect with `rl: bdpo`: in preference training",
        {**CHAT, "train_on_eos": "turn", "roles_to_train": ["assistant"]},
    ),
    "jinja": (
        {**CHAT, "chat_template": "jinja"},
        "`datasets[0].chat_template: jinja` needs `datasets[0].chat_template_jinja`",
        {**CHAT, "chat_template": "jinja", "chat_template_jinja": "x"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("place", ["datasets", "test_datasets"])
def test_refused_before_anything_is_loaded(case, place):
    entry, said, remedy = REFUSED[case]
    with pytest.raises(BDPOError) as refusal:
        check_entries({place: [entry]})
    assert said.replace("datasets[0]", f"{place}[0]") in str(refusal.value)
    check_entries({place: [remedy]})


def test_a_function_of_the_users_own_may_read_any_key(loaded, tmp_path, monkeypatch):
    (tmp_path / "mine_for_axolotl.py").write_text(
        "def load(cfg, dataset_idx=0, **kwargs):\n"
        "    entry = cfg['datasets'][dataset_idx]\n"
        "    return lambda row: {'prompt': entry['greeting'] + row['q']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"q": "Why?", "chosen": "So.", "rejected": "No."}]
    made = loaded(rows, type="mine_for_axolotl.load", entry={"greeting": "Hi. "})
    assert made["prompt"] == ["Hi. Why?"]


def test_what_is_dropped_elsewhere_is_a_warning_by_name(config, caplog):
    logger = logging.getLogger("axolotl.bdpo")
    logger.addHandler(caplog.handler)
    try:
        from bdpo_plugin.hosts.axolotl.rewrite_config import resolve

        resolve(config(lora_dropuot=0.1, trl={"bta": 0.2, "beta": 0.1}, debug=True))
    finally:
        logger.removeHandler(caplog.handler)
    told = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
    assert told == {
        "B-DPO: `trl.bta` has no effect: Axolotl drops it. Did you mean `beta`?",
        "B-DPO: `lora_dropuot` has no effect: Axolotl drops it. Did you mean `lora_dropout`?",
    }


def test_rows_keep_their_numbers_in_the_file(loaded):
    """In a part of it, and where those that differ in their numbers alone are one."""
    rows = [{"messages": str(i // 2), "chosen": "It is.", "rejected": "No."} for i in range(8)]
    made = loaded(rows, entry={"split": "train[3:6]+train[7:]"}, dataset_exact_deduplication=True)
    assert made["bdpo_file_row"] == ["3", "4", "7"]
