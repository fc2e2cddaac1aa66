"""Finds the null prompt x0: the prompt format of a run without a query (method section 4). The
scorer of a run calls :func:`find_null_prompt`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdpo_plugin.reference.chat_template import (
    Ids,
    Turns,
    as_ids,
    as_string,
    common_end,
    common_start,
    template_turns,
)
from bdpo_plugin.settings import BDPOError

#: A common beginning or end counts as the scaffold if at least this share of the prompts has it.
MIN_MATCH_RATE = 0.9
#: The chat template is not used if a smaller share of the prompts than this is in its format.
_MAJORITY = 0.5
#: The last sentence of every warning.
_REMEDY = "`bdpo_null_prompt`, your prompt format with the query left out, sets another one."


@dataclass(frozen=True)
class NullPrompt:
    """The prompt of a run without a query.

    Attributes:
        ids: its token ids, at least one.
        text: the decoded ids.
        source: a description of where it comes from.
        match_rate: the share of the training prompts that have exactly these tokens before and
            after their query; None if it is unknown, because the turns of the prompts are unknown.
        warnings: warnings for the user.
    """

    ids: tuple[int, ...]
    text: str
    source: str
    match_rate: float | None = None
    warnings: tuple[str, ...] = ()


def find_null_prompt(
    tokenizer: Any, prompts: Sequence[Ids], override: str | None = None
) -> NullPrompt:
    """Finds the null prompt for a training set (method section 4).

    It uses the first of these that exists: the override; the tokens of the prompts before the first
    and after the last user message, where most prompts agree on them, else those of the tokenizer's
    chat template; if the prompts are not in the template's format, the longest beginning and end
    that all prompts share; the BOS token (EOS if there is no BOS token).

    Raises:
        BDPOError: The override has no token, or there is neither a BOS nor an EOS token to fall
            back on.
    """
    if override is not None:
        ids = tuple(tokenizer(override, add_special_tokens=False)["input_ids"])
        if not ids:
            raise BDPOError(
                f"`bdpo_null_prompt: {override!r}` has no token under this tokenizer: write a "
                "prompt with the query left out, or leave the key out to have it derived."
            )
        return NullPrompt(ids, tokenizer.decode(ids), "bdpo_null_prompt")

    def made(ids: tuple[int, ...], source: str, *rest: Any) -> NullPrompt:
        return NullPrompt(ids, tokenizer.decode(ids), source, *rest)

    strings = [as_string(prompt) for prompt in prompts]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    bos_string = "" if bos is None else as_string([bos])
    turns = template_turns(tokenizer)
    if turns and (found := _around_queries(turns, strings)):
        front, back, rate = found
        if (front + back).strip(bos_string):
            own = (front, back) == (turns.front, turns.back)
            return made(
                as_ids(front + back),
                "chat template" if own else "chat template and what the prompts share",
                rate,
                (*_rate_warning(rate), *_role_warnings(turns, strings, front + back)),
            )

    unused = ""
    if turns is None and getattr(tokenizer, "chat_template", None):
        unused = ", as the chat template cannot render a lone message of the user"
    front, back = common_start(strings), common_end(strings)
    # A scaffold has more tokens than BOS, and leaves room for a query in every prompt.
    room = min(map(len, strings), default=0) - len(front) - len(back)
    if (front + back).strip(bos_string) and room > 0:
        return made(
            as_ids(front + back),
            f"shared by all prompts{unused}",
            None,
            (
                *_cut_warning(tokenizer, turns, strings, front.lstrip(bos_string), back),
                *_role_warnings(turns, strings, front + back),
            ),
        )

    if bos is None:
        raise BDPOError(
            "No null prompt: the prompts share no beginning or end, and the tokenizer has neither "
            "a BOS nor an EOS token. Set `bdpo_null_prompt` to your prompt format without a query."
        )
    return made(
        (bos,),
        f"BOS token{unused}",
        None,
        (
            "the prompts have no common beginning or end, so the mutual information is measured "
            "against a bare "
            f"{tokenizer.decode([bos])!r}, which puts several nats on the first token and distorts "
            f"the ranking. {_REMEDY}",
        ),
    )


def _around_queries(turns: Turns, prompts: Sequence[str]) -> tuple[str, str, float] | None:
    """Returns the tokens of the prompts before the first and after the last user message, and the
    share of the prompts that have exactly these tokens; None if most prompts are not in the
    template's format."""
    if not prompts:
        return None
    ends = [
        (front, back)
        for prompt in prompts
        if (front := turns.before_query(prompt)) is not None
        and (back := turns.after_query(prompt)) is not None
        and len(front) + len(back) < len(prompt)
    ]
    if len(ends) < _MAJORITY * len(prompts):
        return None
    enough = MIN_MATCH_RATE * len(prompts)
    front, alike_fronts = Counter(front for front, _ in ends).most_common(1)[0]
    back, alike_backs = Counter(back for _, back in ends).most_common(1)[0]
    if min(alike_fronts, alike_backs) < enough:
        # The prompts do not agree. In another format than the template's, a few tokens may look
        # like a turn by accident, so most prompts must begin or end like the template.
        begin = sum(prompt.startswith(turns.front) for prompt in prompts if turns.front)
        end = sum(prompt.endswith(turns.back) for prompt in prompts if turns.back)
        if max(begin, end) < _MAJORITY * len(prompts):
            return None
    front = front if alike_fronts >= enough else turns.front
    back = back if alike_backs >= enough else turns.back
    return front, back, ends.count((front, back)) / len(prompts)


def _rate_warning(rate: float) -> tuple[str, ...]:
    if rate >= MIN_MATCH_RATE:
        return ()
    return (
        f"{1 - rate:.1%} of the prompts begin or end otherwise than the null prompt. What they "
        "have before the user's first message (another system message than the rest, or none) and "
        f"after the last one counts as part of their query. {_REMEDY}",
    )


def _role_warnings(turns: Turns | None, prompts: Sequence[str], null: str) -> tuple[str, ...]:
    """Returns a warning for each role other than the user that occurs in prompts and not in the
    null prompt."""
    warnings = []
    for role, header in turns.roles.items() if turns else ():
        having = sum(header in prompt for prompt in prompts)
        if having and header not in null:
            warnings.append(
                f"{having / len(prompts):.1%} of the prompts have a {role} message and the null "
                "prompt has none, so that what a response owes to these messages counts as its "
                f"mutual information with the query. {_REMEDY}"
            )
    return tuple(warnings)


def _cut_warning(
    tokenizer: Any, turns: Turns | None, prompts: Sequence[str], front: str, back: str
) -> tuple[str, ...]:
    """Returns a warning if the tokens that all prompts share seem to be cut within a turn. Used for
    prompts that are not in the template's format.

    Special tokens begin and end turns. There are two signs of a cut. The common beginning stops
    right after a special token that also occurs in the common end, where it begins a turn: then the
    beginning contains at most a part of a turn's header. Or the common end contains special tokens
    and there is no common beginning: then the turn that the end closes is missing.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, entry in added.items() if entry.special}
    special |= set(tokenizer.all_special_ids)
    marks = {char for char in front + back if ord(char) in special}
    cut = bool(marks) and (not front or front[-1] in marks & set(back))
    if turns and turns.opener and turns.opener not in front + back:
        cut = cut or any(turns.opener in prompt for prompt in prompts)
    if not cut:
        return ()
    return (
        "what all prompts share is no whole turn of the user: they differ too early, by another "
        "system message perhaps, or were cut. The mutual information is measured against a "
        f"malformed prompt. {_REMEDY}",
    )
