"""The checks of `bdpo doctor` on the rows and pairs of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from bdpo_plugin.data.pairs import check_pairs, is_blank
from bdpo_plugin.inspection.configuration import Inspected
from bdpo_plugin.inspection.findings import FAILED, OK, UNKNOWN, WARNING, Finding
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.datasets import check_control_column

#: Fewer pairs than this show whether a run works, but teach a model little of a preference.
FEW = 100

#: What to do about each problem of a pair, those apart that have a key.
_FIXES = {
    "empty": "Write both responses, or remove these rows",
    "identical": "Make the two responses differ, or remove these rows",
    "blank": "Write text into these responses, or remove the rows",
    "double_bos": "Take the BOS token out of the text of these rows",
}


def data_findings(data: Inspected) -> Iterator[Finding]:
    """Yields all findings about the rows and pairs of a run."""
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
            f"tokenized_path: {data.prepared}-2",
        )  # fmt: skip
    yield from _pairs(data)
    yield _length(data)
    yield from _control(data)


def _pairs(data: Inspected) -> Iterator[Finding]:
    report = check_pairs(
        data.pairs,
        "train",
        lengths=data.lengths,
        bos=data.tokenizer.bos_token_id,
        is_blank=lambda ids: is_blank(data.tokenizer, ids),
        numbers=data.names,
    )
    for problem, line in zip(report.rows, report.lines(), strict=True):
        cut = f"{data.keys.length}: {data.uncut()}" if problem == "truncated" else ""
        yield Finding("pairs", WARNING, line, cut or _FIXES[problem])
    try:
        report.raise_if_nothing_left()
    except BDPOError as error:
        yield Finding("pairs", FAILED, str(error))
        return
    usable, batch = report.total - len(report.dropped), data.plan.batch
    yield Finding("pairs", OK, f"{usable} of {report.total} can be trained on")
    more = "bdpo data pku-saferlhf --output pairs.jsonl"
    if usable < batch:
        keys = data.keys
        yield Finding(
            "pairs", WARNING,
            f"a step of the optimizer takes {batch} pairs (`{keys.rows}` x `{keys.accumulation}`), "
            f"and there are {usable}: an epoch is less than one step",
            f"{keys.accumulation}: 1",
        )  # fmt: skip
    if usable < FEW:
        yield Finding(
            "pairs", WARNING,
            f"{usable} pairs are enough to see whether a run works, and too few to teach a "
            "preference: have some thousands, of your own or of public data",
            more,
        )  # fmt: skip


def _length(data: Inspected) -> Finding:
    key, limit = data.keys.length, data.plan.max_length
    longest = data.longest
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
        uncut = data.uncut()
        words = f"`{key}: {limit}`: {'; '.join(told)}. The longest has {uncut} tokens"
        return Finding("length", WARNING, words, f"{key}: {uncut}")
    return Finding("length", OK, f"`{key}: {limit}`; the longest sequence has {longest} tokens")


def _control(data: Inspected) -> Iterator[Finding]:
    """Checks that all data sets have the column within which a control shuffles."""
    if (column := data.settings.control_column) is None:
        return
    fix = "bdpo_control: shuffled"
    for name, columns in data.columns.items():
        try:
            check_control_column(column, columns, name)
        except BDPOError as error:
            yield Finding("control", FAILED, str(error), fix)
            return
    without = [source for source in data.sources if column not in source.rows.column_names]
    if without:
        names = ", ".join(str(source.file or "a data set of the hub") for source in without)
        yield Finding(
            "control", WARNING,
            f"`bdpo_control: {data.settings.control}`: {names} has no column `{column}`. Its rows "
            "count as one more value of it",
            fix,
        )  # fmt: skip
    else:
        yield Finding("control", OK, f"all data sets have the column `{column}`")
