"""A run whose chat template writes today's date is continued the next day, and no other change
passes as one of the date."""

import datetime
import re
import shutil

import pytest
import transformers.utils.chat_template_utils as templates
from running import pairs, sharp_model, trainer

from bdpo_plugin import BDPOError
from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.training.template_dates import TemplateDates


def tokenizer_with(head):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = head + tokenizer.chat_template
    return tokenizer


def today(monkeypatch, year, month, day):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(year, month, day, 9, 5)

    monkeypatch.setattr(templates, "datetime", Clock)


#: What the templates of models have: Llama 3.2, gpt-oss, Mistral, SmolLM3, Granite.
HEADS = {
    "llama": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n",
    "gpt-oss": "Current date: {{ strftime_now('%Y-%m-%d') }}\n",
    "mistral": '{%- set today = strftime_now("%Y-%m-%d") %}'
    "Last updated on 2023-10-01. The current date is {{ today }}.\n",
    "smollm": '{%- set today = strftime_now("%d %B %Y") -%}Today Date: {{ today }}\n',
    "granite": "Today's Date: {{ strftime_now('%B %d, %Y') }}.\n",
    "named": "{% set form = '%A, %-d %b' %}It is {{ strftime_now(form) }}.\n",
    "hour": "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%H:%M') }}\n",
}


@pytest.mark.parametrize("head", HEADS)
def test_the_dates_of_a_template_are_known(head, monkeypatch) -> None:
    tokenizer = tokenizer_with(HEADS[head])
    dates = TemplateDates.of(tokenizer)
    texts = []
    for day in ((2026, 11, 30), (2026, 12, 1), (2027, 5, 9)):
        today(monkeypatch, *day)
        message = {"role": "user", "content": "On 2026-11-30, 30 Nov 2026 or 30 November 2026?"}
        texts.append(tokenizer.apply_chat_template([message], tokenize=False))
    assert len(set(texts)) == 3
    assert len({dates.without(text) for text in texts}) == 1
    assert "2026-11-30, 30 Nov 2026 or 30 November" in dates.without(texts[1])
    assert dates.first(texts[0]) in texts[0]


def test_a_template_without_a_clock_has_none() -> None:
    assert TemplateDates.of(build_tokenizer()) is None
    assert TemplateDates.of(None) is None
    several = build_tokenizer()
    several.chat_template = {"default": "x", "tool_use": HEADS["gpt-oss"]}
    assert TemplateDates.of(several).formats == (("%Y-%m-%d", 1),)
    assert TemplateDates.of(None, ["%Y"]).without("It is 2026.") == "It is <date>."


DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
OPTIONS = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dated")
    with pytest.MonkeyPatch.context() as patch:
        today(patch, 2026, 11, 30)
        made = trainer(output_dir=folder, tokenizer=tokenizer_with(DATED), max_steps=2, **OPTIONS)
        made.train()
    return folder / "checkpoint-2"


def continued(yesterday, tmp_path, monkeypatch, **changes):
    today(monkeypatch, 2026, 12, 1)
    shutil.copytree(yesterday, tmp_path / "checkpoint-2")
    tokenizer = changes.pop("tokenizer", None) or tokenizer_with(DATED)
    made = trainer(
        output_dir=tmp_path, tokenizer=tokenizer, model=sharp_model(), **OPTIONS | changes
    )
    return made.train(resume_from_checkpoint=True)


def test_the_next_day_it_goes_on(yesterday, tmp_path, monkeypatch, capsys) -> None:
    assert continued(yesterday, tmp_path, monkeypatch).global_step == 4
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    told = "writes today's date into the prompts: 30 Nov 2026 where the checkpoint was trained, "
    assert f"{told}01 Dec 2026 here" in out
    assert out.count("today's date") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": pairs(24, seed=6)}, "the training pairs: other ones, in another order"),
        (
            {"tokenizer": tokenizer_with(DATED.replace("Today", "So today"))},
            r'the null prompt: ".*Today is 30 Nov 2026.* there, ".*So today is 01 Dec 2026',
        ),
        (
            {"tokenizer": tokenizer_with(DATED.replace("%d %b %Y", "%Y-%m-%d"))},
            r"the null prompt: .*30 Nov 2026.* there, .*2026-12-01.* here",
        ),
    ],
    ids=["pairs", "template", "format"],
)
def test_what_else_differs_is_refused_in_words(
    yesterday, tmp_path, monkeypatch, changes, words
) -> None:
    with pytest.raises(BDPOError, match=words) as caught:
        continued(yesterday, tmp_path, monkeypatch, **changes)
    assert not re.search(r"\[\d+, \d+", str(caught.value))  # no token ids
