"""The checks of `bdpo doctor` on the texts that the model reads: tool calls, special tokens, null
prompt, prompt boundary and thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bdpo_plugin.data.pairs import first_rows
from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.inspection.findings import FAILED, OK, WARNING, Finding
from bdpo_plugin.reference.null_prompt import NullPrompt, find_null_prompt
from bdpo_plugin.settings import BDPOError

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
#: How templates write their special tokens. `[INST]` is not among them: some models that read it
#: have no token for it.
_MARK = re.compile(r"<\|[^\s|<>]{1,40}\|>|<(?:start|end)_of_turn>")


def find_null(data: Inspected) -> NullPrompt | str:
    """Returns the null prompt of a run, or the reason why there is none."""
    prompts = [pair.chosen.prompt_ids for pair in data.pairs]
    try:
        return find_null_prompt(data.tokenizer, prompts, data.settings.null_prompt)
    except BDPOError as error:
        return str(error)


def text_findings(data: Inspected, null: NullPrompt | str) -> Iterator[Finding]:
    """Yields all findings about the texts of a run.

    Args:
        data: the data of the run.
        null: its null prompt, or the reason why there is none.
    """
    yield _calls(data)
    yield _special_tokens(data)
    yield from _null_prompt(data, null)
    yield _boundary(data)
    yield _thinking(data)


def _calls(data: Inspected) -> Finding:
    """Checks that tool calls, tools and images of each row appear in its rendered text."""
    lost: dict[str, list[int]] = {}
    seen = 0
    for source in data.sources:
        wanted = {
            number: needed for number, row in enumerate(source.rows) if (needed := _asks(row))
        }
        seen += len(wanted)
        if not wanted:
            continue
        for number, text in enumerate(data.rendered(source)):
            for what, words in wanted.get(number, ()):
                if words is None or words not in text:
                    lost.setdefault(what, []).append(number)
    if lost:
        told = "; ".join(f"{what} (rows {first_rows(rows)})" for what, rows in lost.items())
        return Finding(
            "tools and images", WARNING,
            f"the model does not read what these rows have: {told}",
            "Choose a template and a dataset type that write them, or remove these rows",
        )  # fmt: skip
    words = f"all that {seen} rows have is in their text" if seen else "the data has none"
    return Finding("tools and images", OK, words)


def _asks(row: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Returns the parts of a row that its text must contain: their names and a piece of text.

    The piece of text is None for parts that can never appear in text."""
    needed: list[tuple[str, str | None]] = []
    for column, value in row.items():
        if column in _MEDIA and value:
            needed.append((f"`{column}`", None))
        if column == "tools" and value:
            tools = json.loads(value) if isinstance(value, str) else value
            needed += [("tools", name) for tool in tools if (name := _name(tool))]
        for message in value if isinstance(value, list) else [value]:
            if not isinstance(message, Mapping):
                continue
            calls = message.get("tool_calls") or []
            needed += [("tool calls", name) for call in calls if (name := _name(call))]
            content = message.get("content")
            if isinstance(content, list):
                kinds = {p["type"] for p in content if isinstance(p, Mapping) and "type" in p}
                needed += [(f"{kind} parts", None) for kind in sorted(kinds - {"text"})]
    return needed


def _name(tool: Any) -> str | None:
    """Returns the name of the function of a tool or of a tool call."""
    if not isinstance(tool, Mapping):
        return None
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else tool.get("name")
    return name if isinstance(name, str) else None


def _special_tokens(data: Inspected) -> Finding:
    """Checks that the tokenizer has the special tokens that the chat template writes."""
    known = data.tokenizer.get_vocab()
    texts = (
        data.tokenizer.decode([*side.prompt_ids, *side.completion_ids])
        for pair in [*data.first, *data.pairs[:3]]
        for side in pair
    )
    marks = dict.fromkeys(mark for text in texts for mark in _MARK.findall(text))
    lost = [mark for mark in marks if mark not in known and mark not in data.own_template]
    if not lost:
        return Finding("special tokens", OK, f"the tokenizer has {', '.join(marks) or 'all'}")
    named = ", ".join(lost)
    fix = data.keys.own_template
    if not data.own_template:
        names = ", ".join(map(json.dumps, lost)) if "[" in data.keys.new_tokens else named
        fix = data.keys.new_tokens.replace("{}", names)
    return Finding(
        "special tokens", WARNING,
        f"the model reads {named}, which the tokenizer has no token for and splits into pieces: "
        "the chat template is probably that of another model, and no answer will end as it should. "
        "Use the template that the model was trained with, or add the tokens and train them",
        fix,
    )  # fmt: skip


def _null_prompt(data: Inspected, null: NullPrompt | str) -> Iterator[Finding]:
    example = data.tokenizer.decode(data.pairs[0].chosen.prompt_ids) if data.pairs else ""
    fix = f"bdpo_null_prompt: {json.dumps(example, ensure_ascii=False)}  # take the question out"
    if isinstance(null, str):
        yield Finding("null prompt", FAILED, null, fix)
        return
    rate = "" if null.match_rate is None else f"; {null.match_rate:.1%} of the prompts so"
    yield Finding("null prompt", OK, f"{null.text!r} ({null.source}{rate})")
    for warning in null.warnings:
        yield Finding("null prompt", WARNING, warning, fix)


def _boundary(data: Inspected) -> Finding:
    if data.prompt_boundary_mismatch is None:
        return Finding("boundary", OK, "the host tokenises prompt and response separately")
    if not (rows := data.prompt_boundary_mismatch):
        return Finding("boundary", OK, "every response begins where its prompt's tokens end")
    return Finding(
        "boundary", WARNING,
        f"the prompt's tokens are not where the response begins in {len(rows)} of "
        f"{len(data.pairs)} pairs (rows {first_rows(rows, data.names)}): begin the response on a "
        "token boundary",
        "Move the white space at the end of the prompt to the beginning of the response, or out",
    )  # fmt: skip


def _thinking(data: Inspected) -> Finding:
    """Checks that prompts or responses contain a thought, if the chat template writes thoughts.

    With thinking off, templates like Qwen3's write an empty thought before the answer at inference,
    which the response of a training pair lacks."""
    template = data.tokenizer.chat_template or ""
    if not isinstance(template, str) or "<think>" not in template:
        return Finding("thinking", OK, "the tokenizer's chat template writes no thoughts")
    ends = [data.tokenizer.decode(pair.chosen.prompt_ids[-12:]) for pair in data.pairs]
    starts = [data.tokenizer.decode(pair.chosen.completion_ids[:12]) for pair in data.pairs]
    without = [
        number
        for number, (end, start) in enumerate(zip(ends, starts, strict=True))
        if "<think>" not in end and not start.lstrip().startswith("<think>")
    ]
    if not without:
        return Finding("thinking", OK, "every prompt or response has a thought, if an empty one")
    return Finding(
        "thinking", WARNING,
        f"the model's template has thoughts; {len(without)} of {len(ends)} pairs have none, not "
        "even the empty one that the model reads where thinking is off: it would be trained on "
        f"answers in a form that it never gives. The prompt must end with the empty thought "
        "(`<think>\\n\\n</think>\\n\\n`)",
        data.keys.no_thinking,
    )  # fmt: skip
