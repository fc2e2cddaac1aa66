"""Rows that Axolotl would write as "None" or stop at are told with their numbers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets

from bdpo_plugin.settings import BDPOError


@pytest.fixture
def refusal(tiny, config):
    """Loads data and returns what B-DPO says of it."""

    def load(rows, type="chat_template.default", **changes):
        (given,) = tiny["datasets"]
        Path(given["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {**tiny, "datasets": [{**given, "type": type}], **changes}
        with pytest.raises(BDPOError) as raised:
            load_preference_datasets(cfg=load_cfg(config(**keys)))
        return str(raised.value)

    return load


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
    rows[5] = row(rejected="")
    rows[6] = row() | {"chosen": None}
    told = refusal(rows)
    assert "train.jsonl data cannot be trained on:" in told
    for words in (
        "1 of 8 rows: the `content` of a message of `messages` is None (rows 1)",
        "1 of 8 rows: the `content` of a message of `chosen` is None (rows 3)",
        "the `role` of a message of `messages` is 'human' (rows 4). Name it in the dataset's",
        "`rejected` is empty, and Axolotl would train on the prompt's template instead (rows 5)",
        "1 of 8 rows: `chosen` is None (rows 6). Remove these rows, or fill them in.",
    ):
        assert words in told


def test_a_response_that_is_not_found_in_what_the_template_makes(refusal):
    """Axolotl would train on the template's first turn: "user" is found there already."""
    told = refusal([row(), row(chosen="user"), row()])
    assert "1 of 3 rows: Axolotl does not find the text of `chosen`" in told
    assert "(rows 1)" in told
    shout = "{{ messages[-1]['content'] | upper }}"
    told = refusal([row()], chat_template="jinja", chat_template_jinja=shout)
    assert "1 of 1 rows: Axolotl does not find the text of `rejected`" in told


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
    assert "the dataset's `type` raises KeyError: 'rejected' (rows 0)" in told


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
        made[rl] = sorted(map(json.dumps, data.train_dataset.to_list()))  # Axolotl shuffles them
    assert made["bdpo"] == made["dpo"]
