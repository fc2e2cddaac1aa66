"""Generated data, tokenizers, templates and settings: each trains on right scores or is refused.

Usage: python -m soak.fuzz [--cases 1000] [--seed 0]

A case is a real BDPOTrainer on a model of one layer. Either it trains one step, with scores equal
to those of tests/truth.py in float64, the text of each row in its tokens, and every row either
trained on or told as dropped; or one BDPOError refuses it, which names the rows that are at fault.
Anything else is a failure, and is made as small as possible before it is shown.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import datasets
import torch
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import truth
from real_runs import as_function

from bdpo_plugin import BDPOConfig, BDPOError, BDPOTrainer
from bdpo_plugin.demo.tiny import build_model, build_tokenizer

#: Largest difference of a score from the truth, in nats.
TOLERANCE = 1e-3

#: A case that takes longer, in seconds, hangs.
PATIENCE = 60

SIDES = ("prompt", "chosen", "rejected")


# --- what is drawn --------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        "yes",
        "no",
        "Why is the sky blue?",
        " It is late. ",
        "",
        " ",
        "\n\t",
        "\x00\x1b[31mred",
        "<|im_end|>",
        "<|im_start|>user\n",
        "[bold]x[/bold]",
        "\u202eright to left",
        "é\u0301",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "None",
        "{{ x }}",
        "many words " * 40,
    ]
) | st.text(max_size=12)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}" + CHATML,
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "bare": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    "no empty": CHATML.replace("in messages", "in messages if m['content']"),
    "parts": CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}",
    ),
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + CHATML,
    "only system": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + CHATML,
    "joins": CHATML.replace("{{ m['content'] }}", "{{ m['content'] + '' }}"),
    "always raises": "{{ raise_exception('never') }}",
    "none": None,
}


def message(role: str) -> st.SearchStrategy:
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXTS})


def conversation() -> st.SearchStrategy:
    return st.builds(
        lambda system, turns, last: [*system, *(m for turn in turns for m in turn), last],
        st.just([]) | st.lists(message("system"), min_size=1, max_size=1),
        st.just([]) | st.lists(st.tuples(message("user"), message("assistant")), max_size=1),
        message("user"),
    )


def answer() -> st.SearchStrategy:
    return st.lists(message("assistant"), min_size=1, max_size=1)


PAIRS = {
    "text": st.fixed_dictionaries(dict.fromkeys(SIDES, TEXTS)),
    "messages": st.fixed_dictionaries(
        {"prompt": conversation(), "chosen": answer(), "rejected": answer()}
    ),
    "whole conversations": st.builds(
        lambda start, chosen, rejected: {"chosen": start + chosen, "rejected": start + rejected},
        conversation(),
        answer(),
        answer(),
    ),
    "whole texts": st.builds(
        lambda start, chosen, rejected: {"chosen": start + chosen, "rejected": start + rejected},
        TEXTS,
        TEXTS,
        TEXTS,
    ),
}

#: In the place of a side.
WRONG = st.sampled_from(
    [
        None,
        3,
        float("nan"),
        True,
        {},
        [],
        "text",
        "half \ud800",
        [None],
        ["text"],
        [{"from": "human", "value": "Why?"}],
        [{"role": "user"}],
        [{"role": None, "content": "a"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": 4}],
        [{"role": "assistant", "content": "\udfff"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "part"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
        [{"role": "critic", "content": "a"}],
    ]
)

HOSTILE = {
    "ref_chosen_logps": 1.0,
    "bdpo_weight_chosen": 9.0,
    "bdpo_row": 5,
    "length": "long",
    "messages": "text",
    "completion": [{"role": "user", "content": "a"}],
    "prompt_ids": [1, 2],
    "label": None,
    "tools": '[{"type": "function", "function": {"name": "f"}}]',
    "chat_template_kwargs": {"thinking": False},
}


@dataclass
class Case:
    """What is given to the trainer."""

    form: str
    rows: list[dict[str, Any]]
    tokenizer: str
    template: str
    settings: dict[str, Any]
    stream: bool = False


@st.composite
def cases(draw: Any) -> Case:
    form = draw(st.sampled_from(sorted(PAIRS)))
    rows = draw(
        st.lists(PAIRS[form], min_size=draw(st.sampled_from([0] + [1, 2, 3] * 5)), max_size=6)
    )
    for _ in range(draw(st.sampled_from([0, 0, 1, 2])) if rows else 0):
        row = draw(st.sampled_from(rows))
        side = draw(st.sampled_from(SIDES))
        if draw(st.sampled_from([True] * 9 + [False])):
            row[side] = draw(WRONG)
        else:
            row.pop(side, None)
    if rows and draw(st.sampled_from([False] * 7 + [True])):
        twin = draw(st.sampled_from(rows))
        twin["rejected"] = twin.get("chosen")
    extra = draw(st.lists(st.sampled_from(sorted(HOSTILE)), max_size=2, unique=True))
    rows = [{**row, **{name: HOSTILE[name] for name in extra}} for row in rows]
    if rows and draw(st.sampled_from([False] * 19 + [True])):
        rows = [{k: v for k, v in row.items() if k != "chosen"} for row in rows]
    options = {
        "bdpo_alpha": draw(st.sampled_from([0.0, 1.5, 30.0])),
        "bdpo_weighting": draw(st.sampled_from(["softmax", "power"])),
        "bdpo_mi_estimator": draw(st.sampled_from(["pointwise", "expected"])),
        "bdpo_mi_normalize": draw(st.booleans()),
        "bdpo_precompute": draw(st.sampled_from([True, True, False])),
        "bdpo_score_tokens": draw(st.sampled_from([1, 64, 4096])),
        "bdpo_null_prompt": draw(st.sampled_from([None, None, None, "Say:"])),
        "max_length": draw(st.sampled_from([512] * 5 + [None, 32, 8])),
        "truncation_mode": draw(st.sampled_from(["keep_start", "keep_start", "keep_end"])),
    }
    return Case(
        form,
        rows,
        draw(st.sampled_from(["bytes", "bytes with BOS", "words"] * 4 + sorted(TOKENIZERS))),
        draw(st.sampled_from(["chatml"] * 4 + sorted(TEMPLATES))),
        options,
        draw(st.sampled_from([False, False, False, True])),
    )


# --- tokenizers and models ------------------------------------------------------------------


def _words() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = re.findall(r"\S+", "user assistant system yes no Why is the sky blue ? It late . None")
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(names + words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def _without(**tokens: None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(vocab_size=400)
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


TOKENIZERS = {
    "bytes": lambda: build_tokenizer(vocab_size=400),
    "bytes with BOS": lambda: build_tokenizer(vocab_size=400, bos=True),
    "words": _words,
    "no padding": lambda: _without(pad_token=None),
    "no EOS": lambda: _without(eos_token=None),
    "neither": lambda: _without(eos_token=None, pad_token=None),
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[kind]()


@cache
def model_of(kind: str) -> Any:
    model = build_model(tokenizer_of(kind), hidden_size=32, layers=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@cache
def reference_of(kind: str) -> truth.Model:
    return as_function(copy.deepcopy(model_of(kind)))


# --- what must come of a case ---------------------------------------------------------------


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def is_message(value: Any, parts: bool) -> bool:
    if not isinstance(value, dict) or not is_text(value.get("role")):
        return False
    content = value.get("content")
    if content is None:
        return bool(value.get("tool_calls"))
    if isinstance(content, list):
        return parts and all(is_text(part.get("text")) for part in content)
    return is_text(content)


def is_pair(row: dict[str, Any], parts: bool) -> bool:
    """Whether a row is a preference pair, if perhaps a useless one."""
    if not {"chosen", "rejected"} <= set(row):
        return False
    sides = [row[side] for side in SIDES if side in row]
    if all(isinstance(side, str) for side in sides):
        return all(map(is_text, sides))
    if not all(isinstance(side, list) for side in sides):
        return False
    return row.get("prompt", True) != [] and all(is_message(m, parts) for s in sides for m in s)


def faulty_rows(rows: list[dict[str, Any]], parts: bool) -> list[int]:
    """The rows that are no pairs, or whose form is not that of the first one that is."""
    good = [i for i, row in enumerate(rows) if is_pair(row, parts)]
    if not good:
        return list(range(len(rows)))
    form = type(rows[good[0]]["chosen"])
    return [i for i, r in enumerate(rows) if i not in good or not isinstance(r["chosen"], form)]


def raising_rows(case: Case, rows: list[dict[str, Any]]) -> list[int]:
    """The rows at which the chat template raises."""
    tokenizer = copy.deepcopy(tokenizer_of(case.tokenizer))
    tokenizer.chat_template = TEMPLATES[case.template]
    return [number for number, row in enumerate(rows) if _raises(tokenizer, row)]


def _raises(tokenizer: Any, row: dict[str, Any]) -> bool:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, list) and chosen and isinstance(rejected, list) and rejected):
        return False
    both = zip(chosen, rejected, strict=False)
    shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    if len(shared) == min(len(chosen), len(rejected)):
        shared = shared[:-1]
    start = row.get("prompt", [])
    try:
        tokenizer.apply_chat_template(start or shared, tokenize=False, add_generation_prompt=True)
        tokenizer.apply_chat_template(start + chosen, tokenize=False)
        tokenizer.apply_chat_template(start + rejected, tokenize=False)
    except Exception:  # whatever a template raises
        return True
    return False


def numbers_in(told: str) -> set[int]:
    """All row numbers of a message."""
    groups = re.findall(r"\(rows? ([\d, ]+)|\b[Rr]ow (\d+)", told)
    return {int(number) for group in groups for number in re.findall(r"\d+", " ".join(group))}


@dataclass
class Tally:
    """What came of the cases so far."""

    outcomes: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    error: float = 0.0
    started: float = field(default_factory=time.monotonic)


def make_data(case: Case) -> Any:
    """The dataset, or a stream where Arrow takes no such rows or a stream is wanted."""
    with contextlib.suppress(Exception):  # the user's own line, before anybody else
        made = Dataset.from_list(copy.deepcopy(case.rows))
        return made.to_iterable_dataset() if case.stream and len(made) else made
    rows = copy.deepcopy(case.rows)
    return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))


def run(case: Case, folder: Path) -> tuple[Any, str]:
    """The trainer after its step, and all that was printed."""
    tokenizer = copy.deepcopy(tokenizer_of(case.tokenizer))
    tokenizer.chat_template = TEMPLATES[case.template]
    data = make_data(case)
    precompute = case.settings["bdpo_precompute"] and isinstance(data, Dataset)
    arguments = BDPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bdpo_cache_dir=str(folder / "cache"),
        **{**case.settings, "bdpo_precompute": precompute},
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        trainer = BDPOTrainer(
            copy.deepcopy(model_of(case.tokenizer)),
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )
        trainer.train()
    return trainer, re.sub(r"[│\s]+", " ", out.getvalue())


def check(case: Case, tally: Tally) -> None:
    """Raises AssertionError, or whatever the trainer raises that is no BDPOError."""
    folder = Path(tempfile.mkdtemp())
    data = make_data(case)
    rows = list(data)
    parts = case.template == "parts"
    faulty = faulty_rows(rows, parts) if rows else []
    try:
        trainer, told = run(case, folder)
    except BDPOError as error:
        check_refusal(str(error), case, rows, isinstance(data, IterableDataset), faulty)
        tally.outcomes[_kind_of_refusal(str(error))] += 1
        return
    finally:
        shutil.rmtree(folder)
    assert not faulty, f"trained on rows {faulty}"
    kept = list(trainer.train_dataset)
    dropped = sum(map(int, re.findall(r"(\d+) of (?:the )?\d+ pairs [^(]*\(dropped", told)))
    assert len(kept) + dropped == len(rows), f"{len(rows)} rows, {len(kept)} kept: {told}"
    tally.rows.update(kept=len(kept), dropped=dropped)
    tally.error = max(tally.error, check_scores(case, trainer, kept))
    if "not where the response begins" not in told and not isinstance(data, IterableDataset):
        check_tokens(case, trainer._tokenizer, rows, kept)
    tally.outcomes["trained, in each step" if not trainer.settings.precompute else "trained"] += 1


def check_refusal(
    told: str, case: Case, rows: list[dict[str, Any]], stream: bool, faulty: list[int]
) -> None:
    assert told.rstrip().endswith("."), told
    named = numbers_in(told)
    if "template or tokenizer raises" in told:
        raising = raising_rows(case, rows)
        assert named == (set(sorted(raising)[:1]) if stream else set(raising[:5])), told
    elif faulty and not stream and "tokenizer has n" not in told:
        assert set(faulty[:5]) <= named, f"rows {faulty} are at fault: {told}"
    if "begin with the same" not in told and "cannot be trained on" in told:
        assert named <= {*faulty, *raising_rows(case, rows)}, told


def _kind_of_refusal(told: str) -> str:
    lines = told.splitlines()
    line = next((li for li in lines if li.startswith("- ")), lines[0])
    line = re.sub(r"^- (\d+ of \d+ rows: )?|`[^`]*`|'[^']*'|\(.*|\d+", "", line)
    return "refused: " + " ".join(line.split())[:60]


def truncated(case: Case, row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and response of a row as trained on."""
    ids = row["prompt_ids"] + row[f"{side}_ids"]
    start = len(row["prompt_ids"])
    if (limit := case.settings["max_length"]) is not None and len(ids) > limit:
        if case.settings["truncation_mode"] == "keep_end":
            start = max(0, start - (len(ids) - limit))
            ids = ids[-limit:]
        ids = ids[:limit]
    start = max(1, min(start, len(ids)))  # nothing predicts a first token
    return ids[:start], ids[start:]


def check_scores(case: Case, trainer: Any, kept: list[dict[str, Any]]) -> float:
    """Compares with the truth; returns the largest difference in nats."""
    null = list(trainer.scorer.null_prompt.ids)
    model = reference_of(case.tokenizer)
    estimate = {"pointwise": truth.pointwise_mi, "expected": truth.expected_mi}[
        case.settings["bdpo_mi_estimator"]
    ]
    worst, means = 0.0, dict.fromkeys(("chosen", "rejected"), 0.0)
    measured = trainer.settings.weighs
    for row in kept:
        for side in means:
            prompt, response = truncated(case, row, side)
            mi = estimate(model, prompt, null, response, case.settings["bdpo_mi_normalize"])
            means[side] += mi / len(kept)
            if trainer.settings.precompute:
                logps = truth.response_logps(model, prompt, response)
                for name, value in (("ref_{}_logps", logps), ("mi_{}", mi))[: 1 + measured]:
                    saved = row["bdpo_" + name.format(side)]
                    worst = max(worst, abs(saved - value))
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for side, mean in means.items():
        if measured:
            worst = max(worst, abs(log[f"bdpo/mi_{side}"] - mean))
        else:
            assert f"bdpo/mi_{side}" not in log
    assert worst < TOLERANCE, f"scores are off by {worst} nats"
    assert abs(log["loss"] - 0.693147) < 1e-4, log
    return worst


def check_tokens(case: Case, tokenizer: Any, rows: list[dict], kept: list[dict]) -> None:
    """The tokens of a row are those of its own text."""
    for row in kept:
        given = rows[row["bdpo_row"]]
        for side in ("chosen", "rejected"):
            whole = given.get("prompt", given[side][:0]) + given[side]
            if isinstance(whole, str):
                # TRL ends what is left of a response once its prompt is taken from it
                eos = tokenizer.eos_token
                ends = ["", eos]
                if "prompt" in given:
                    ends = ["" if given[side].endswith(eos) else eos]
                found = [tokenizer(whole + end)["input_ids"] for end in ends]
            else:
                tools = given.get("tools")
                text = tokenizer.apply_chat_template(
                    whole,
                    tokenize=False,
                    tools=json.loads(tools) if isinstance(tools, str) else tools,
                    **(given.get("chat_template_kwargs") or {}),
                )
                found = [tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert row["prompt_ids"] + row[f"{side}_ids"] in found, f"row {row['bdpo_row']}"


# --- many of them ---------------------------------------------------------------------------


def _too_long(*_: Any) -> None:
    raise AssertionError(f"a case took longer than {PATIENCE} s")


@contextlib.contextmanager
def quiet() -> Any:
    """Without bars and warnings of the libraries; a case that hangs is a failure."""
    datasets.disable_progress_bars()
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        datasets.enable_progress_bars()


def fuzz(count: int, start: int | None = None) -> Tally:
    """Runs cases; without a seed the same ones each time."""
    tally = Tally()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=start is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases())
    def one(case: Case) -> None:
        signal.alarm(PATIENCE)
        check(case, tally)

    with quiet():
        (seed(start)(one) if start is not None else one)()
    return tally


@click.command(help=__doc__)
@click.option("--cases", "count", default=1000, show_default=True)
@click.option("--seed", "start", default=0, show_default=True)
def main(count: int, start: int) -> None:
    tally = fuzz(count, start)
    for outcome, number in tally.outcomes.most_common():
        click.echo(f"{number:6d}  {outcome}")
    click.echo(f"{tally.rows['kept']} rows trained on, {tally.rows['dropped']} told as dropped")
    click.echo(f"largest difference of a score from the truth: {tally.error:.1e} nats")
    click.echo(f"{sum(tally.outcomes.values())} cases in {time.monotonic() - tally.started:.0f} s")


if __name__ == "__main__":
    main()
