"""The data of a study: pairs to train on, and what is asked afterwards."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources import hh_rlhf, xstest
from bdpo_plugin.sources.forms import Pair, read_pairs, read_text
from bdpo_plugin.sources.selection import select
from studies.real_models.design import HELD_OUT, TUNING_SEEDS, Sizes, Training
from studies.real_models.refusal import read_prompts

_PROMPTS = Path(__file__).parent / "prompts"
_SENTENCES = re.compile(r"(?<=[.!?:])\s+")
#: Of one prompt; there are up to six ways to choose a refusal and a help of five models' answers.
_PER_PROMPT = 4
#: Of hh-rlhf: the longest conversation before the answer.
_PROMPT_TOKENS = 96
#: Of hh-rlhf: pairs that the tuning was evaluated on.
_TUNED_HH = Sizes().hh


@dataclass(frozen=True)
class Choice:
    """A held-out prompt of XSTest, with what people labelled full refusals and full help."""

    prompt: str
    type: str
    unsafe: bool
    refusals: tuple[str, ...]
    helps: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What :func:`load` found.

    Attributes:
        xstest, hh: pairs to train on, of all prompts that are not held out.
        choices: the held-out prompts of XSTest that have both kinds of answers.
        hh_held_out: other pairs of hh-rlhf.
        ordinary: questions and answers of another source, for the negative log-likelihood.
        prompts: sets of prompts to be answered: ``harmful`` (StrongREJECT), ``unsafe`` and ``safe``
            (held-out types of XSTest), ``ordinary``.
    """

    xstest: list[Pair]
    hh: list[Pair]
    choices: list[Choice]
    hh_held_out: list[Pair]
    ordinary: list[tuple[list[dict[str, str]], str]]
    prompts: dict[str, list[str]]

    def training(self, setting: Training, seed: int) -> list[Pair]:
        """The training pairs of a seed, in random order."""
        return training_pairs(self.xstest, self.hh, setting, seed)


def training_pairs(xstest: list[Pair], hh: list[Pair], setting: Training, seed: int) -> list[Pair]:
    """As many pairs of each source as the setting says, in random order."""
    half = setting.xstest // 2
    of_xstest, _ = select(
        ((pair["label"], pair) for pair in xstest),
        {"safe": half, "unsafe": half},
        seed=seed,
        per_prompt=_PER_PROMPT,
    )
    of_hh, _ = select((("pair", pair) for pair in hh), {"pair": setting.hh}, seed=seed)
    keys = ("label", "messages", "chosen", "rejected")
    pairs = [{key: pair[key] for key in keys} for pair in of_xstest + of_hh]
    if len(pairs) < setting.xstest + setting.hh:
        raise BDPOError(
            f"there are only {len(of_xstest)} pairs of XSTest and {len(of_hh)} others that are not "
            f"held out, where {setting.xstest} and {setting.hh} are wanted"
        )
    random.Random(seed).shuffle(pairs)
    return pairs


def half(
    pairs: Sequence[Pair],
    gaps: Sequence[float],
    tokens: Sequence[tuple[int, int]],
    name: str,
    seed: int,
) -> list[Pair]:
    """One of two halves of pairs that are alike in label and length, in the pairs' order.

    Each pair is coupled with the one of its label whose two answers are nearest in length. Of a
    couple, the ``imbalanced`` half has the pair whose mutual information differs more between
    chosen and rejected, the ``balanced`` half the other one; ``one`` and ``other`` are by a coin.

    Args:
        gaps: (B,) absolute difference of the mutual information, nats per token.
        tokens: (B,) of chosen and rejected.
    """
    draw = random.Random(seed)
    by_label: dict[str, list[int]] = {}
    for i in draw.sample(range(len(pairs)), len(pairs)):
        by_label.setdefault(pairs[i]["label"], []).append(i)
    taken = []
    for left in by_label.values():
        while len(left) > 1:
            i = left.pop()
            near = [
                sum(abs(a - b) for a, b in zip(tokens[i], tokens[j], strict=True)) for j in left
            ]
            couple = [i, left.pop(near.index(min(near)))]
            if name in ("imbalanced", "balanced"):
                couple.sort(key=lambda k: gaps[k], reverse=True)
            else:
                draw.shuffle(couple)
            taken.append(couple[0 if name in ("imbalanced", "one") else 1])
    return [pairs[i] for i in sorted(taken)]


def load(
    folder: Path, tokenizer: Any, tokens: int, sizes: Sizes, *, unseen: bool = False
) -> Material:
    """Read and choose; the same for every arm and seed.

    Args:
        folder: with ``xstest/`` (labelled answers), ``hh-rlhf/harmless-base.test.jsonl.gz``,
            ``strongreject/strongreject_dataset.csv`` and ``llamafactory/dpo_en_demo.json.gz``.
        tokens: the longest answer, in tokens; longer ones are cut after a sentence, and left out
            where the first sentence is longer.
        unseen: whether prompts and pairs are held out that no tuning has seen: the types of XSTest
            that are trained on and those that are held out change places, and what the tuning was
            trained or evaluated on is in neither.

    Raises:
        BDPOError: a file is missing, or of another form.
    """

    def cut(text: str) -> str:
        return shorten(text, tokenizer, tokens)

    answers = [a._replace(text=cut(a.text)) for a in xstest.read_answers(folder / "xstest")]
    held_out = [answer for answer in answers if answer.type in HELD_OUT]
    learnt = [answer for answer in answers if answer.type not in HELD_OUT]
    pairs = _pairs(learnt)
    hh = _harmless(folder / "hh-rlhf" / "harmless-base.test.jsonl.gz", tokenizer, tokens)
    if unseen:
        seen = _tuned_on(pairs, hh)
        hh = [pair for pair in hh[_TUNED_HH:] if pair["messages"][-1]["content"] not in seen]
        held_out = [answer for answer in learnt if answer.prompt not in seen]
        pairs = _pairs([answer for answer in answers if answer.type in HELD_OUT])
    demo = folder / "llamafactory" / "dpo_en_demo.json.gz"
    ordinary = [
        (pair["messages"], text)
        for pair in read_pairs(read_text(demo), str(demo))
        if len(pair["messages"]) == 1 and (text := cut(pair["chosen"]["content"]))
    ]
    prompts = {
        "harmful": _strongreject(folder / "strongreject" / "strongreject_dataset.csv"),
        "unsafe": list(dict.fromkeys(a.prompt for a in held_out if a.unsafe)),
        "safe": list(dict.fromkeys(a.prompt for a in held_out if not a.unsafe)),
        "ordinary": _ordinary(ordinary),
    }
    counts = vars(sizes)
    return Material(
        xstest=pairs,
        hh=hh[sizes.hh :],
        choices=_choices(held_out, sizes.likened),
        hh_held_out=hh[: sizes.hh],
        ordinary=_sample(ordinary, sizes.nll),
        prompts={name: _sample(found, counts[name]) for name, found in prompts.items()},
    )


def load_file(
    file: Path, evaluations: Path | None, tokenizer: Any, tokens: int, sizes: Sizes
) -> Material:
    """The same of a file of pairs; the held-out ones, too, are drawn from it.

    Args:
        file: pairs in a form of `bdpo data`; ``label`` is kept, "pair" where there is none.
        evaluations: a folder with ``xstest/`` and ``strongreject/``; None to ask the prompts
            written for this study, with no choice between answers.
        tokens: answers are cut after a sentence, to so many tokens at most.

    Raises:
        BDPOError: a file cannot be read, or has too few pairs.
    """

    def cut(text: str) -> str:
        return shorten(text, tokenizer, tokens)

    pairs = []
    for pair in read_pairs(read_text(file), str(file)):
        texts = [cut(pair[side]["content"]) for side in ("chosen", "rejected")]
        if all(texts) and texts[0] != texts[1]:
            chosen, rejected = ({"role": "assistant", "content": text} for text in texts)
            pairs.append({"label": "pair", **pair, "chosen": chosen, "rejected": rejected})
    random.Random(0).shuffle(pairs)
    held_out = pairs[: sizes.hh]
    asked = {json.dumps(pair["messages"]) for pair in held_out}
    ordinary = [(pair["messages"], pair["chosen"]["content"]) for pair in held_out]
    trained = {pair["messages"][-1]["content"] for pair in pairs}
    answers = xstest.read_answers(evaluations / "xstest") if evaluations else []
    answers = [answer for answer in answers if answer.prompt not in trained]
    prompts = {"ordinary": read_prompts(_PROMPTS / "benign.txt")}
    if evaluations:
        prompts["harmful"] = _strongreject(
            evaluations / "strongreject" / "strongreject_dataset.csv"
        )
        prompts["unsafe"] = list(dict.fromkeys(a.prompt for a in answers if a.unsafe))
        prompts["safe"] = list(dict.fromkeys(a.prompt for a in answers if not a.unsafe))
    else:
        prompts["harmful"] = read_prompts(_PROMPTS / "harmful.txt")
        prompts["safe"] = read_prompts(_PROMPTS / "lookalike.txt")
    counts = vars(sizes)
    return Material(
        xstest=[],
        hh=[pair for pair in pairs[sizes.hh :] if json.dumps(pair["messages"]) not in asked],
        choices=_choices([a._replace(text=cut(a.text)) for a in answers], sizes.likened),
        hh_held_out=held_out,
        ordinary=_sample(ordinary, sizes.nll),
        prompts={name: _sample(found, counts[name]) for name, found in prompts.items()},
    )


def _pairs(answers: Sequence[xstest.Answer]) -> list[Pair]:
    return [pair for _, pair in xstest.sort(answers) if pair is not None]


def _tuned_on(pairs: list[Pair], hh: list[Pair]) -> set[str]:
    """The last messages of the pairs that the tuning was trained on."""
    return {
        pair["messages"][-1]["content"]
        for seed in TUNING_SEEDS
        for pair in training_pairs(pairs, hh[_TUNED_HH:], Training(), seed)
    }


def shorten(text: str, tokenizer: Any, tokens: int) -> str:
    """As many whole sentences from the beginning as fit into `tokens`; empty if not one does."""
    kept = ""
    for end in [*(m.start() for m in _SENTENCES.finditer(text)), len(text)]:
        if len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) > tokens:
            break
        kept = text[:end]
    return kept.strip().removesuffix(":")


def _harmless(file: Path, tokenizer: Any, tokens: int) -> list[Pair]:
    """Short conversations, in random order, each answer cut."""
    found = []
    for _, pair in hh_rlhf.sort(str(file)):
        if pair is None:
            continue
        prompt = tokenizer.apply_chat_template(pair["messages"], tokenize=False)
        if len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) > _PROMPT_TOKENS:
            continue
        texts = [
            shorten(pair[side]["content"], tokenizer, tokens) for side in ("chosen", "rejected")
        ]
        if all(texts) and texts[0] != texts[1]:
            chosen, rejected = ({"role": "assistant", "content": text} for text in texts)
            found.append({**pair, "chosen": chosen, "rejected": rejected})
    random.Random(0).shuffle(found)
    return found


def _choices(answers: Sequence[xstest.Answer], most: int) -> list[Choice]:
    by_prompt: dict[str, list[xstest.Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.id, []).append(answer)
    found = []
    for of_prompt in by_prompt.values():
        texts = {
            label: tuple(
                _sample({a.text: None for a in of_prompt if a.text and a.label == label}, most)
            )
            for label in (xstest.REFUSAL, xstest.COMPLIANCE)
        }
        if all(texts.values()):
            first = of_prompt[0]
            found.append(Choice(first.prompt, first.type, first.unsafe, *texts.values()))
    return found


def _strongreject(file: Path) -> list[str]:
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""))
    return [row["forbidden_prompt"].strip() for row in rows]


def _ordinary(questions: Sequence[tuple[list[dict[str, str]], str]]) -> list[str]:
    """Those written for this benchmark, then the shorter half of the ordinary questions."""
    texts = sorted((messages[-1]["content"] for messages, _ in questions), key=len)
    return [*read_prompts(_PROMPTS / "benign.txt"), *texts[: len(texts) // 2]]


def _sample(found: Iterable[Any], count: int) -> list[Any]:
    return random.Random(0).sample(drawn := list(found), min(count, len(drawn)))
