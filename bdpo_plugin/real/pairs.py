"""Preference pairs of several forms, as the pairs that the recipes read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from bdpo_plugin.settings import BDPOError

#: ``{"messages": [message], "chosen": message, "rejected": message}``, a message being
#: ``{"role", "content"}``.
Pair = dict[str, Any]

FORMS = (
    "the columns `messages`, `chosen` and `rejected`, messages as {role, content} (as "
    "train.jsonl), `conversations`, `chosen` and `rejected`, messages as {from, value} "
    '(LLaMA-Factory), or `chosen` and `rejected`, whole transcripts with "\\n\\nHuman: " and '
    '"\\n\\nAssistant: " (hh-rlhf)'
)
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_pairs(text: str, name: str) -> list[Pair]:
    """The pairs of a JSON array or of JSON lines, in one of the :data:`FORMS`.

    A row whose responses are empty or equal, or whose transcripts differ before the last answer, is
    left out: there is nothing in it to prefer. Other columns beside `messages` stay.

    Raises:
        BDPOError: a row is of another form; `name` is the file's.
    """
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, lines)
        pairs = [_pair(row) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BDPOError(
            f"{name} cannot be read ({type(error).__name__}: {error}). A JSON array or JSON lines "
            f"are wanted, with {FORMS}."
        ) from error
    return [pair for pair in pairs if pair is not None]


def _pair(row: Mapping[str, Any]) -> Pair | None:
    if "conversations" in row:
        messages = [_message(turn) for turn in row["conversations"]]
        chosen, rejected = _message(row["chosen"]), _message(row["rejected"])
    elif "messages" in row:
        messages, chosen, rejected = row["messages"], row["chosen"], row["rejected"]
    else:
        *messages, chosen = _turns(row["chosen"])
        *others, rejected = _turns(row["rejected"])
        if others != messages:
            return None
    texts = [chosen["content"].strip(), rejected["content"].strip()]
    roles = [message["role"] for message in (*messages[-1:], chosen, rejected)]
    if roles != ["user", "assistant", "assistant"] or not all(texts) or texts[0] == texts[1]:
        return None
    more = row if "messages" in row else {}
    return {**more, "messages": messages, "chosen": chosen, "rejected": rejected}


def _message(turn: Mapping[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _turns(transcript: str) -> list[dict[str, str]]:
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", transcript)
    if before or not parts:
        raise ValueError("a transcript does not begin with 'Human:'")
    return [
        {"role": _SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def select(
    pairs: Iterable[Pair],
    counts: Mapping[str, int],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    seed: int,
) -> dict[str, list[Pair]]:
    """As many pairs for each split as `counts` says, at random, no prompt twice.

    Args:
        max_tokens: of the prompt, as the chat template renders it, with either response: a longer
            pair is not taken, as cutting it would change what is preferred.

    Raises:
        BDPOError: there are not so many.
    """
    short: dict[str, Pair] = {}
    for pair in pairs:
        whole = [[*pair["messages"], pair[answer]] for answer in ("chosen", "rejected")]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in whole]
        lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
        if max(lengths) <= max_tokens:
            short.setdefault(json.dumps(pair["messages"]), pair)
    drawn = random.Random(seed).sample(list(short.values()), len(short))
    if len(drawn) < sum(counts.values()):
        raise BDPOError(
            f"there are only {len(drawn)} pairs of different prompts and at most {max_tokens} "
            f"tokens, fewer than the {' + '.join(map(str, counts.values()))} wanted: set "
            "--train-pairs, --eval-pairs or --max-tokens"
        )
    splits = {}
    for split, count in counts.items():
        splits[split], drawn = drawn[:count], drawn[count:]
    return splits


def prompts(pairs: Iterable[Pair], count: int) -> list[str]:
    """The shortest last user messages, of the shortest conversations, each on one line."""
    last = [(len(pair["messages"]), pair["messages"][-1]["content"]) for pair in pairs]
    shortest = sorted(last, key=lambda turns_text: (turns_text[0], len(turns_text[1])))
    return [" ".join(text.split()) for _, text in shortest[:count]]
