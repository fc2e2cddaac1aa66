"""Thirty and more typical mistakes, each made, with what is said and the fix that is offered: the
table of docs/troubleshooting.md. To write it anew: `python tests/inspection/test_mistakes.py`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from sound_data import PAIRS, PLAN, QUERIES, inspected, tokenizer

from bdpo_plugin.cli import environment
from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.data.raw_rows import RowCheck, check_rows
from bdpo_plugin.demo.tiny import build_model, build_tokenizer
from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.inspection.data_findings import data_findings
from bdpo_plugin.inspection.findings import FAILED, WARNING, Finding, fix_in
from bdpo_plugin.inspection.model_shape import known_shapes
from bdpo_plugin.inspection.run_findings import memory_finding, run_findings
from bdpo_plugin.inspection.text_findings import find_null, text_findings
from bdpo_plugin.recipes.host_config import check_model, check_preference, read_config
from bdpo_plugin.settings import BDPOError, BDPOSettings

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
TITLE = "## Thirty mistakes, and what is said"
#: What is said, and the fix.
Said = tuple[str, str]
MISTAKES: dict[str, Callable[[Path], Said]] = {}


def mistake(words: str, made: Callable[[Path], Said]) -> None:
    assert words not in MISTAKES
    MISTAKES[words] = made


# Keys of B-DPO ---------------------------------------------------------------------------------


def of_keys(**keys: Any) -> Said:
    with pytest.raises(BDPOError) as raised:
        BDPOSettings.from_keys(keys)
    return str(raised.value), fix_in(str(raised.value), keys)


for words, keys in {
    "a misspelt key": {"bdpo_alfa": 1.5},
    "a negative alpha": {"bdpo_alpha": -1},
    "alpha in words": {"bdpo_alpha": "high"},
    "a weighting that there is not": {"bdpo_weighting": "linear"},
    "an estimator that there is not": {"bdpo_mi_estimator": "mean"},
    "a switch in quotation marks": {"bdpo_scaling": "no"},
    "an empty null prompt": {"bdpo_null_prompt": ""},
    "a scoring batch without tokens": {"bdpo_score_tokens": 0},
    "a control that there is not": {"bdpo_control": "shuffle"},
    "a control of a run that is scored step by step": {
        "bdpo_control": "shuffled",
        "bdpo_precompute": False,
    },
}.items():
    mistake(words, lambda _, keys=keys: of_keys(**keys))  # type: ignore[misc]


# The configuration -----------------------------------------------------------------------------


def of_file(folder: Path, text: str) -> Said:
    (folder / "config.yml").write_text(text)
    try:
        config = read_config(folder / "config.yml")
        check_preference(folder / "config.yml", config)
        check_model(config.host, config.keys)
    except click.ClickException as error:
        return error.message, fix_in(error.message, yaml.safe_load(text))
    raise AssertionError(f"nothing is said of {text}")


for words, text in {
    "a file of another tool": "model: gpt2\n",
    "the keys of both hosts": "base_model: a\nmodel_name_or_path: a\n",
    "another method than preference pairs": "base_model: a\nrl: kto\n",
    "LLaMA-Factory's stage left out": "model_name_or_path: a\npref_loss: bdpo\n",
    "a model that is not there": "base_model: ./no/such/model\nrl: bdpo\n",
}.items():
    mistake(words, lambda folder, text=text: of_file(folder, text))  # type: ignore[misc]


# Rows of the file ------------------------------------------------------------------------------

_ROW = {"prompt": "Is tea a herb?", "chosen": "No.", "rejected": "Yes."}


def of_row(**changes: Any) -> Said:
    row = {k: v for k, v in (_ROW | changes).items() if v != "left out"}
    with pytest.raises(BDPOError) as raised:
        check_rows([row], "train", RowCheck())
    return str(raised.value), ""


for words, changes in {
    "a value left empty": {"rejected": None},
    "a column of another name": {"rejected": "left out", "refused": "Yes."},
    "a number in place of text": {"chosen": 5},
    "a message without its role": {"chosen": [{"content": "No."}]},
}.items():
    mistake(words, lambda _, changes=changes: of_row(**changes))  # type: ignore[misc]


# Pairs, as `bdpo doctor` looks at them ---------------------------------------------------------


def looked_at(data: Inspected) -> list[Finding]:
    null = find_null(data)
    return [*data_findings(data), *text_findings(data, null)]


def of_data(name: str, **changes: Any) -> Said:
    found = [f for f in looked_at(inspected(**changes)) if f.state in (WARNING, FAILED)]
    return next((f.words, f.fix) for f in found if f.name == name)


def with_first(count: int, *row: str) -> list[tuple[str, str, str]]:
    return [(*PAIRS[0][:1], *row)] * count + PAIRS[count:]  # type: ignore[list-item]


THINKING = {"chat_template": "{{ '<think>' }}"}
for words, (name, changed) in {
    "the same answer on both sides": ("pairs", {"rows": with_first(2, "No.", "No.")}),
    "an empty answer": ("pairs", {"rows": with_first(1, "", "Yes."), "lengths": [(0, 1)] * 120}),
    "a prompt that fills the sequence length": ("pairs", {"rows": with_first(1, "", "")}),
    "an answer of special tokens alone": ("pairs", {"rows": with_first(1, "<|im_end|>", "Yes.")}),
    "BOS in the text and from the tokenizer": (
        "pairs",
        {"rows": [(f"<|bos|>{PAIRS[0][0]}", "No.", "Yes."), *PAIRS[1:]]},
    ),
    "a handful of pairs": ("pairs", {"rows": PAIRS[:40]}),
    "fewer pairs than a step takes": ("pairs", {"rows": PAIRS[:8]}),
    "answers longer than the sequence length": ("length", {"cut": 12}),
    "a control's column missing in an evaluation set": (
        "control",
        {
            "settings": BDPOSettings(control="shuffled:label"),
            "columns": {"train": ["prompt", "label"], "eval": ["prompt"]},
        },
    ),
    "tool calls that the template does not write": (
        "tools and images",
        {"source": {"prompt": ["Go on."], "tools": [[{"name": "look_up_weather"}]]}},
    ),
    "the chat template of another model": (
        "special tokens",
        {"rows": [(f"<|user|>\n{q}\n<|assistant|>\n", "No.", "Yes.") for q in QUERIES]},
    ),
    "prompts that share no format": (
        "null prompt",
        {"rows": [(f"{n} plus {n * n}", "No.", "Yes.") for n in range(120)]},
    ),
    "a space at the end of a prompt": ("boundary", {"prompt_boundary_mismatch": [3, 4]}),
}.items():
    mistake(words, lambda _, name=name, changed=changed: of_data(name, **changed))  # type: ignore[misc]


def thoughts(folder: Path) -> Said:
    data = inspected()
    thinking = build_tokenizer(bos=True)
    thinking.chat_template = f"{thinking.chat_template}{{{{ '<think>' }}}}"
    found = looked_at(replace(data, tokenizer=thinking))
    return next((f.words, f.fix) for f in found if f.name == "thinking")


def no_embedding(folder: Path) -> Said:
    build_model(tokenizer(), hidden_size=32, layers=2, vocab_size=1000).save_pretrained(folder)
    data = inspected(plan=replace(PLAN, model=str(folder)), resizes=False)
    last = Side(data.pairs[0].chosen.prompt_ids, np.array([len(tokenizer()) - 1]))
    data = replace(data, pairs=[Pair(last, data.pairs[0].rejected)])
    found = run_findings(data, find_null(data))
    return next((f.words, f.fix) for f in found if f.state == FAILED)


def too_large(folder: Path) -> Said:
    shape = known_shapes()[PLAN.model]
    found = memory_finding(shape, inspected(), device=23.6)
    assert found.state == WARNING
    return found.words, found.fix


def entry_point_off(folder: Path) -> Said:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDPO_AUTOLOAD", "0")
        (found,) = (f for f in environment.environment() if f.name == "entry point")
    return found.words, found.fix


mistake("a model that thinks, and answers without a thought", thoughts)
mistake("a token that the model has no embedding for", no_embedding)
mistake("a run that is too large for the GPU", too_large)
mistake("the entry point switched off", entry_point_off)


# The table -------------------------------------------------------------------------------------


def row_of(words: str, folder: Path) -> str:
    """The row of the table, by making the mistake."""
    said, fix = MISTAKES[words](folder)
    said = said.replace(f"{folder}/", "").replace("|", "\\|")
    said = " ".join(said.split())
    return f"| {words} | {said} | {'<br>'.join(map(_as_code, fix.splitlines()))} |"


def _as_code(line: str) -> str:
    line = line.replace("|", "\\|")
    return line if line[0].isupper() else f"`` {line} ``"


def table() -> dict[str, str]:
    section = PAGE.read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return {line[2:].partition(" | ")[0]: line for line in lines}


@pytest.mark.parametrize("words", MISTAKES)
def test_what_is_said_of_a_mistake_is_in_the_table(words, tmp_path) -> None:
    assert table()[words] == row_of(words, tmp_path)


def test_the_table_has_thirty_mistakes_and_no_other() -> None:
    assert list(table()) == list(MISTAKES)
    assert len(MISTAKES) >= 30


def test_sound_data_has_no_finding() -> None:
    assert [f for f in looked_at(inspected()) if f.state != "ok"] == []


def write() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(TITLE)
    intro, _, _ = rest.partition("\n| ")
    after = re.search(r"\n## .*", rest, re.DOTALL)
    rows = ["| mistake | what is said | fix |", "| --- | --- | --- |"]
    for words in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(words, Path(folder)))
    text = before + TITLE + intro + "\n" + "\n".join(rows) + "\n" + (after[0] if after else "")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
