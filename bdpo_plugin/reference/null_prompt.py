"""The null prompt x0: the scaffold of a prompt with the query taken out (method section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from bdpo_plugin.settings import BDPOError

#: The template's scaffold is used if at least this share of the prompts begin and end with it.
MIN_MATCH_RATE = 0.9


@dataclass(frozen=True)
class NullPrompt:
    """The query-free prompt of a run.

    Attributes:
        ids: its token ids, at least one.
        text: the ids, decoded.
        source: where it comes from, in words.
        match_rate: share of the training prompts that begin and end as it does; None where
            that has no meaning.
        warning: what the user should know about it, if anything.
    """

    ids: tuple[int, ...]
    text: str
    source: str
    match_rate: float | None = None
    warning: str | None = None


def find_null_prompt(
    tokenizer: Any, prompts: Sequence[Sequence[int]], override: str | None = None
) -> NullPrompt:
    """The null prompt for a training set.

    In this order: the override; the tokens that any one-turn prompt rendered by the tokenizer's
    chat template has at its front and back, if the data's prompts have them too; the longest
    front and back that all prompts of the data share; the BOS token, with a warning.

    Args:
        tokenizer: of the run.
        prompts: token ids of the training prompts, as trained on.
        override: the key ``bdpo_null_prompt``.

    Raises:
        BDPOError: the override has no token, or there is no BOS token to fall back on.
    """
    if override is not None:
        ids = tuple(tokenizer(override, add_special_tokens=False)["input_ids"])
        if not ids:
            raise BDPOError(
                f"`bdpo_null_prompt: {override!r}` has no token under this tokenizer: write a "
                "prompt with the query left out, or leave the key out to have it derived."
            )
        return NullPrompt(ids, tokenizer.decode(ids), "bdpo_null_prompt")

    rate = 0.0
    if scaffold := _template_scaffold(tokenizer):
        front, back = scaffold
        matches = [_framed(prompt, front, back) for prompt in prompts]
        rate = sum(matches) / max(1, len(matches))
        if rate >= MIN_MATCH_RATE:
            ids = front + back
            return NullPrompt(ids, tokenizer.decode(ids), "chat template", rate)

    front = _shared_front(prompts)
    back = _shared_front([p[::-1] for p in prompts])[::-1]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # A scaffold is more than BOS, and it leaves room for a query in every prompt.
    room = min((len(p) for p in prompts), default=0) - len(front) - len(back)
    ids = front + back
    if set(ids) - {bos} and room > 0:
        return NullPrompt(ids, tokenizer.decode(ids), "shared by all prompts", 1.0)

    if bos is None:
        raise BDPOError(
            "No null prompt: the prompts share no beginning or end, and the tokenizer has neither "
            "a BOS nor an EOS token. Set `bdpo_null_prompt` to your prompt format without a query."
        )
    return NullPrompt(
        (bos,),
        tokenizer.decode([bos]),
        "BOS token",
        rate if scaffold else None,
        warning=(
            "the prompts share no scaffold, so the mutual information is measured against a bare "
            f"{tokenizer.decode([bos])!r}, which puts several nats on the first token and distorts "
            "the ranking. Set `bdpo_null_prompt` to your prompt format with the query left out."
        ),
    )


def _template_scaffold(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Token ids that the chat template puts before and after any query."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    # two queries that share neither their first nor their last token
    rendered = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": query}], add_generation_prompt=True, tokenize=False
            ),
            add_special_tokens=False,
        )["input_ids"]
        for query in ("Who was it?", "7 blue apples")
    ]
    front = _shared_front(rendered)
    back = _shared_front([ids[len(front) :][::-1] for ids in rendered])[::-1]
    return (front, back) if front or back else None


def _shared_front(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest beginning that all sequences have."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)


def _framed(prompt: Sequence[int], front: tuple[int, ...], back: tuple[int, ...]) -> bool:
    return (
        len(prompt) > len(front) + len(back)
        and tuple(prompt[: len(front)]) == front
        and tuple(prompt[len(prompt) - len(back) :]) == back
    )
