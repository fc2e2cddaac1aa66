"""Selects short preference pairs with different prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerFast

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import Pair


def select(
    pairs: Iterable[Pair],
    counts: Mapping[str, int],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    seed: int,
) -> dict[str, list[Pair]]:
    """Draws pairs at random for each split. No prompt occurs twice.

    Args:
        pairs: the pairs to draw from.
        counts: the number of pairs of each split.
        tokenizer: its chat template renders the pairs.
        max_tokens: maximum length of the prompt with either response. Longer pairs are skipped, as
            truncation would change what is preferred.
        seed: of the random choice.

    Raises:
        BDPOError: there are not enough pairs.
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
    """Returns the shortest last user messages of the shortest conversations, each on one line."""
    last = [(len(pair["messages"]), pair["messages"][-1]["content"]) for pair in pairs]
    shortest = sorted(last, key=lambda turns_text: (turns_text[0], len(turns_text[1])))
    return [" ".join(text.split()) for _, text in shortest[:count]]
