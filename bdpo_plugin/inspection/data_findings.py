"""The checks of `bdpo doctor` on the data of a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bdpo_plugin.data.pairs import check_pairs, first_rows, is_blank
from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.reference.null_prompt import find_null_prompt
from bdpo_plugin.settings import BDPOError

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "not known"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Finding(NamedTuple):
    """The result of one check: its name, its state and a message."""

    name: str
    state: str
    words: str


def data_findings(data: Inspected) -> Iterator[Finding]:
    """Yields all findings about the rows of a run that do not need its model."""
    for source in data.sources:
        rows = source.rows
        words = f"{source.file or 'not from one local file'}: {len(rows)} rows, columns "
        yield Finding("data", OK, words + ", ".join(rows.column_names))
    if data.prepared is not None:
        yield Finding(
            "data", WARNING,
            f"`tokenized_path: {data.prepared}` has data that was tokenised before. The training "
            "reads that and nothing else: datasets, template and lengths that this file names have "
            "no effect. Remove the folder, or name another one, to have the data made again",
        )  # fmt: skip
    yield from _pairs(data)
    yield _length(data)
    yield _calls(data)
    yield from _prompts(data)
    yield _thinking(data)


def _pairs(data: Inspected) -> Iterator[Finding]:
    report = check_pairs(
        data.pairs,
        "train",
        lengths=data.lengths,
        bos=data.tokenizer.bos_token_id,
        is_blank=lambda ids: is_blank(data.tokenizer, ids),
    )
    for line in report.lines():
        yield Finding("pairs", WARNING, line)
    try:
        report.raise_if_nothing_left()
    except BDPOError as error:
        yield Finding("pairs", FAILED, str(error))
    else:
        usable = report.total - len(report.dropped)
        yield Finding("pairs", OK, f"{usable} of {report.total} can be trained on")


def _length(data: Inspected) -> Finding:
    key, limit = data.length_key, data.plan.max_length
    longest = max(
        (len(s.prompt_ids) + len(s.completion_ids) for p in data.pairs for s in p), default=0
    )
    if data.prepared is not None:
        return Finding(
            "length", UNKNOWN,
            f"the longest sequence has {longest} tokens, as it was tokenised before: "
            f"`{key}: {limit}` has no effect",
        )  # fmt: skip
    told = []
    if data.left_out:
        told.append(f"{data.left_out} rows are longer and left out")
    if data.cut:
        told.append(f"{data.cut} pairs are cut: their responses lose the end, or the prompt")
    if told:
        return Finding("length", WARNING, f"`{key}: {limit}`: {'; '.join(told)}. Raise it")
    return Finding("length", OK, f"`{key}: {limit}`; the longest sequence has {longest} tokens")


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
            f"not in what the model is to read: {told}. Choose a template and a dataset type that "
            "write them, or take these rows out",
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


def _prompts(data: Inspected) -> Iterator[Finding]:
    prompts = [pair.chosen.prompt_ids for pair in data.pairs]
    try:
        found = find_null_prompt(data.tokenizer, prompts, data.settings.null_prompt)
    except BDPOError as error:
        yield Finding("null prompt", FAILED, str(error))
    else:
        rate = "" if found.match_rate is None else f"; {found.match_rate:.1%} of the prompts so"
        yield Finding("null prompt", OK, f"{found.text!r} ({found.source}{rate})")
        for warning in found.warnings:
            yield Finding("null prompt", WARNING, warning)
    if data.prompt_boundary_mismatch is None:
        yield Finding("boundary", OK, "the host tokenises prompt and response separately")
    elif data.prompt_boundary_mismatch:
        rows = data.prompt_boundary_mismatch
        yield Finding(
            "boundary", WARNING,
            f"the prompt's tokens are not where the response begins in {len(rows)} of "
            f"{len(data.pairs)} pairs (rows {first_rows(rows)}): begin the response on a "
            "token boundary",
        )  # fmt: skip
    else:
        yield Finding("boundary", OK, "every response begins where its prompt's tokens end")


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
    remedy = (
        "Set `enable_thinking: false` (or a template of the model without thinking)"
        if data.template
        else "Use a chat template that writes the empty thought (`<think>\\n\\n</think>\\n\\n`) at "
        "the end of the prompt, as the model's own does with `enable_thinking=False`"
    )
    return Finding(
        "thinking", WARNING,
        f"the model's template has thoughts; {len(without)} of {len(ends)} pairs have none, not "
        "even the empty one that the model reads where thinking is off: it would be trained on "
        f"answers in a form that it never gives. {remedy}",
    )  # fmt: skip
