"""Tables of every experiment, as markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.safety_world.analysis import contrast, difference, wilson
from benchmarks.safety_world.evaluate import HARMFUL, HARMLESS
from benchmarks.safety_world.experiments import Experiment, Size, survey_job
from benchmarks.safety_world.runner import Job, result

#: Key of a measure -> heading, factor.
MEASURES = {
    "score": ("score", 100),
    "harmful": ("harmful refused", 100),
    "harmful_topics": ("harmful, new topics", 100),
    "harmful_wrappers": ("harmful, new wrappers", 100),
    "benign": ("benign helped", 100),
    "benign_topics": ("benign, new topics", 100),
    "lookalike": ("look-alikes helped", 100),
    "nll": ("NLL general", 1),
    "train_margin": ("margin, training, last epoch", 1),
    "margin": ("margin, held out", 1),
    "accuracy": ("accuracy, held out", 100),
}
#: The measures whose differences are in the tables: name, heading, factor.
COMPARED = (
    ("score", 100),
    ("harmful_wrappers", 100),
    ("lookalike", 100),
    ("margin", 1),
    ("train_margin", 1),
)
#: The comparisons of PLAN.md that are confirmatory, with Bonferroni's interval.
CONFIRMATORY = {
    "P1": ("controls", "B-DPO − DPO"),
    "P2": ("controls", "B-DPO − MI shuffled within types"),
}
_LEVEL = 0.975


def write(
    size: Size, tables: Sequence[Experiment], work: Path, folder: Path, failed: dict[str, str]
) -> None:
    """``tables.md`` and the figures, from the results that are there."""
    from benchmarks.safety_world import figures

    def find(job: Job) -> dict[str, Any] | None:
        return result(job, work)

    folder.mkdir(parents=True, exist_ok=True)
    levels = {table.name: table.levels(size.seeds, find) for table in tables}
    surveys = [find(survey_job(size, seed)) for seed in size.seeds]
    lines = [*_head(size, tables, levels, failed), *_survey(surveys)]
    for table in tables:
        lines += _table(table, levels[table.name])
    (folder / "tables.md").write_text("\n".join(lines) + "\n")
    figures.draw(size, tables, levels, surveys, folder)


def tables(size: Size, wanted: Sequence[Experiment], work: Path) -> str:
    """The tables alone."""
    found = {t.name: t.levels(size.seeds, lambda job: result(job, work)) for t in wanted}
    return "\n".join(line for table in wanted for line in _table(table, found[table.name]))


def _head(
    size: Size,
    tables: Sequence[Experiment],
    levels: dict[str, Any],
    failed: dict[str, str],
) -> Iterator[str]:
    seeds = ", ".join(map(str, size.seeds))
    yield "# Tables"
    yield ""
    yield (
        f"Written by `python -m benchmarks.safety_world`. Seeds: {seeds}. "
        f"Jobs that failed: {len(failed)}{': ' if failed else ''}{', '.join(failed)}. "
        f"Comparisons in all tables, of each measure: {sum(len(t.contrasts()) for t in tables)}. "
        "Rates in percent, margins in nats of log-ratio, NLL in nats per token. Intervals: 95 %, "
        "bootstrap over the seeds of the paired difference; then the seeds in which it is above 0."
    )
    yield ""
    yield "## The two confirmatory comparisons (score, 97.5 % intervals)"
    yield ""
    yield "| | comparison | difference |"
    yield "| --- | --- | --- |"
    by_name = {table.name: table for table in tables}
    for name, (table, label) in CONFIRMATORY.items():
        wanted = next(c for c in by_name[table].contrasts() if c.label == label)
        found = contrast(wanted, levels[table], "score", factor=100, level=_LEVEL)
        yield f"| {name} | {label} | {found} |"
    yield ""


def _table(table: Experiment, levels: dict[str, list[dict[str, Any] | None]]) -> Iterator[str]:
    yield f"## {table.title}"
    yield ""
    yield f"| | {' | '.join(heading for heading, _ in MEASURES.values())} | seeds |"
    yield f"| --- |{' --- |' * (len(MEASURES) + 1)}"
    for label, rows in levels.items():
        done = [row for row in rows if row]
        cells = [_level(done, measure, factor) for measure, (_, factor) in MEASURES.items()]
        yield f"| {label} | {' | '.join(cells)} | {len(done)} |"
    yield ""
    if contrasts := table.contrasts():
        yield f"{len(contrasts)} comparisons of each measure:"
        yield ""
        yield f"| | {' | '.join(MEASURES[m][0] for m, _ in COMPARED)} |"
        yield f"| --- |{' --- |' * len(COMPARED)}"
        for wanted in contrasts:
            cells = [str(contrast(wanted, levels, m, factor=f)) for m, f in COMPARED]
            yield f"| {wanted.label} | {' | '.join(cells)} |"
        yield ""


def _level(rows: list[dict[str, Any]], measure: str, factor: float) -> str:
    """The mean over the seeds; of a rate with Wilson's interval, a query being a trial."""
    values = [row[measure] for row in rows if measure in row]
    if not values:
        return ""
    text = f"{factor * fmean(values):.{1 if factor == 100 else 2}f}"
    if measure not in (*HARMFUL, *HARMLESS):
        return text
    answers = sum(sum(row["types"][measure].values()) for row in rows) / 3
    low, high = wilson(fmean(values) * answers, round(answers))
    return f"{text} ({100 * low:.0f}–{100 * high:.0f})"


def _survey(surveys: Sequence[dict[str, Any] | None]) -> Iterator[str]:
    done = [survey for survey in surveys if survey]
    yield "## Mutual information before training (Figure 2)"
    yield ""
    if not done:
        yield "No survey has finished."
        yield ""
        return
    pairs = [pair for survey in done for pair in survey["pairs"]]
    yield "| queries | pairs | chosen higher | median difference | below 0: chosen, rejected |"
    yield "| --- | --- | --- | --- | --- |"
    for kind in Counter(pair["kind"] for pair in pairs):
        of_kind = [pair["mi"] for pair in pairs if pair["kind"] == kind]
        gaps = sorted(abs(chosen - rejected) for chosen, rejected in of_kind)
        higher = fmean(chosen > rejected for chosen, rejected in of_kind)
        below = [100 * fmean(mi[side] < 0 for mi in of_kind) for side in (0, 1)]
        yield (
            f"| {kind} | {len(of_kind)} | {100 * higher:.0f} % | {gaps[len(gaps) // 2]:.2f} | "
            f"{below[0]:.0f} %, {below[1]:.0f} % |"
        )
    yield ""
    yield "Agreement with I_w − I_l under the marginal over other queries:"
    yield ""
    yield "| null prompt, estimator | same sign, % of pairs | least of the seeds | correlation |"
    yield "| --- | --- | --- | --- |"
    for way in done[0]["agreement"]:
        signs = [100 * survey["agreement"][way]["sign"] for survey in done]
        found = difference(signs)
        mean = fmean(survey["agreement"][way]["correlation"] for survey in done)
        yield (
            f"| {way} | {found.mean:.0f} [{found.low:.0f}, {found.high:.0f}] | {min(signs):.0f} | "
            f"{mean:.2f} |"
        )
    yield ""
