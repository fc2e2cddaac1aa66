"""Tables of every experiment, as markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.safety_world import summary
from studies.safety_world.analysis import contrast, difference, wilson
from studies.safety_world.design import Contrast, Experiment, Levels
from studies.safety_world.evaluate import HARMFUL, HARMLESS
from studies.safety_world.experiments import Size, survey_job
from studies.safety_world.records import NAME, read_records
from studies.safety_world.runner import result
from studies.safety_world.weighting import READINGS

#: Key of a measure -> heading, factor.
MEASURES = {
    "score": ("score", 100),
    "held_out": ("held out", 100),
    "harmful": ("harmful refused", 100),
    "harmful_topics": ("harmful, new topics", 100),
    "harmful_wrappers": ("harmful, new wrappers", 100),
    "benign": ("benign helped", 100),
    "benign_topics": ("benign, new topics", 100),
    "lookalike": ("look-alikes helped", 100),
    "well_formed": ("well formed", 100),
    "nll": ("NLL general", 1),
    "margin": ("margin, new pairs", 1),
    "accuracy": ("accuracy, new pairs", 100),
    "train_margin": ("margin, training", 1),
    "train_accuracy": ("accuracy, training", 100),
}
#: The measures whose differences are in the tables, a table for each tuple.
COMPARED = (
    ("score", "held_out", "harmful", "harmful_topics", "harmful_wrappers"),
    ("benign", "benign_topics", "lookalike", "well_formed"),
    ("nll", "margin", "accuracy", "train_margin"),
)
#: What an arm was: key -> heading, factor, decimals; and the tables that have it.
ARMS = {
    "pairs": ("pairs", 1, 0),
    "gap": ("mean of the absolute I_w − I_l", 1, 2),
    "chosen_tokens": ("tokens, chosen", 1, 1),
    "rejected_tokens": ("tokens, rejected", 1, 1),
    "scale": ("mean scale", 1, 2),
    "weight_sd": ("sd of the chosen weight", 1, 2),
    "unmoved": ("keep their own MI, %", 100, 0),
}
WITH_ARMS = ("subsets", "controls", "imbalance", "noise", "pairs", "memorised")
_ADDED = "† added on 2026-11-24, after the plan was committed and before any final run."


def write(size: Size, tables: Sequence[Experiment], folder: Path) -> None:
    """``tables.md`` and the figures, from the records in the folder."""
    from studies.safety_world import figures

    find, failed = read_records(folder / NAME)
    levels = {table.name: table.levels(size.seeds, find) for table in tables}
    surveys = [find(survey_job(size, seed)) for seed in size.seeds]
    lines = [*_head(size, tables, failed), *summary.confirmatory(levels)]
    lines += [*summary.rules(levels, surveys), *summary.readings(levels), *_survey(surveys)]
    for table in tables:
        lines += _table(table, levels[table.name])
    (folder / "tables.md").write_text("\n".join(lines) + "\n")
    figures.draw(size, tables, levels, surveys, folder)


def tables(size: Size, wanted: Sequence[Experiment], work: Path) -> str:
    """The tables alone."""
    found = {t.name: t.levels(size.seeds, lambda job: result(job, work)) for t in wanted}
    return "\n".join(line for table in wanted for line in _table(table, found[table.name]))


def _head(size: Size, tables: Sequence[Experiment], failed: Sequence[str]) -> Iterator[str]:
    yield "# Tables"
    yield ""
    yield (
        f"Written by `python -m studies.safety_world`. Seeds: "
        f"{', '.join(map(str, size.seeds))}. "
        f"Jobs that failed: {len(failed)}{': ' if failed else ''}{', '.join(failed)}."
    )
    yield ""
    made = [(table.identity(c), c.added) for table in tables for c in table.contrasts()]
    measures = sum(map(len, COMPARED))
    later = sum(added for _, added in made)
    yield (
        f"**Comparisons**: {len(made)} contrasts, {len(made) - later} of the plan and {later} "
        f"added (†), of {measures} measures each: {len(made) * measures} in all. As some tables "
        f"repeat a difference of others, {len({identity for identity, _ in made})} of the "
        f"contrasts are distinct (epoch {size.spec('dpo')(0).epochs} of the long runs is the main "
        f"setting's run once more). The rules add {len(READINGS) - 1} contrasts of the score, each "
        "reading with ours. Only the two confirmatory intervals are corrected for their number; "
        "those of the rules have the same level."
    )
    yield ""
    yield (
        "**Score**: half the mean share refused over the three harmful sets, half the mean share "
        "answered well over the three sets of harmless queries. **Held out**: the mean of the two "
        "sets with new topics and the one with new wrappers. **Well formed**: of the answers as "
        "wanted, those that are word for word the grammar's. Rates in percent. Margins in nats of "
        "log-ratio: on the training pairs in the last epoch, and on new pairs of the evaluation. "
        "NLL in nats per token of general text."
    )
    yield ""
    yield (
        "**Differences**: of paired seeds, the mean, its 95 % interval (bootstrap over the "
        "seeds), and the seeds above 0 of the seeds that have it. **Levels**: the mean over the "
        "seeds; of a rate with Wilson's 95 % interval, a query being a trial, which leaves out "
        "the variance between seeds."
    )
    yield ""


def _table(table: Experiment, levels: Levels) -> Iterator[str]:
    yield f"## {table.title}"
    yield ""
    yield f"| | {' | '.join(heading for heading, _ in MEASURES.values())} | seeds |"
    yield f"| --- |{' --- |' * (len(MEASURES) + 1)}"
    for label, rows in levels.items():
        done = [row for row in rows if row]
        cells = [_level(done, measure, factor) for measure, (_, factor) in MEASURES.items()]
        yield f"| {label} | {' | '.join(cells)} | {len(done)} |"
    yield ""
    if table.name in WITH_ARMS:
        yield from _arms(levels)
    if contrasts := table.contrasts():
        count = f"{len(contrasts)} comparison{'s' * (len(contrasts) > 1)} of each measure"
        yield f"{count}.{f' {_ADDED}' if any(c.added for c in contrasts) else ''}"
        yield ""
        for measures in COMPARED:
            yield from _differences(contrasts, levels, measures)


def _differences(
    contrasts: Sequence[Contrast], levels: Levels, measures: Sequence[str]
) -> Iterator[str]:
    yield f"| | {' | '.join(MEASURES[measure][0] for measure in measures)} |"
    yield f"| --- |{' --- |' * len(measures)}"
    for wanted in contrasts:
        cells = []
        for measure in measures:
            factor = MEASURES[measure][1]
            found = contrast(wanted, levels, measure, factor=factor)
            cells.append(found.text(1 if factor == 100 else 2))
        yield f"| {wanted.label}{' †' * wanted.added} | {' | '.join(cells)} |"
    yield ""


def _arms(levels: Levels) -> Iterator[str]:
    yield "What the arms were, means over the seeds (MI in nats per token, weights without unit):"
    yield ""
    yield f"| | {' | '.join(heading for heading, *_ in ARMS.values())} |"
    yield f"| --- |{' --- |' * len(ARMS)}"
    for label, rows in levels.items():
        cells = []
        for key, (_, factor, decimals) in ARMS.items():
            values = [factor * row[key] for row in rows if row and key in row]
            cells.append(f"{fmean(values):.{decimals}f}" if values else "–")
        yield f"| {label} | {' | '.join(cells)} |"
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
