"""The sections that answer: what was confirmed, what would change a default, which reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from studies.safety_world.analysis import difference, paired, sign_flip, student
from studies.safety_world.design import Contrast, Levels
from studies.safety_world.weighting import READINGS

#: The comparisons of PLAN.md that are confirmatory: name -> what is compared.
CONFIRMATORY = {
    "P1": "B-DPO − DPO",
    "P2": "B-DPO − MI shuffled within types",
}
#: Of the confirmatory comparisons and of the rules; Bonferroni's of two.
LEVEL = 0.975
#: The seeds that rule 1 wants improved, and the points that rule 2 wants gained on every seed.
_IMPROVED, _POINTS = 9, 5
_NARROW = (
    "The bootstrap interval of ten values is somewhat too narrow: beside it stands Student's "
    "t-interval of the same level. p: two-sided, over all flips of the seeds' signs."
)
_MEASURED = "bootstrap 97.5 %, seeds above 0 | t, 97.5 % | p"


def confirmatory(levels: dict[str, Levels]) -> Iterator[str]:
    yield "## The two confirmatory comparisons (score)"
    yield ""
    yield f"| | comparison | {_MEASURED} |"
    yield "| --- | --- | --- | --- | --- |"
    for name, label in CONFIRMATORY.items():
        yield f"| {name} | {label} | {_cells(_scores(levels['controls'], label))} |"
    yield ""
    yield _NARROW
    yield ""


def rules(levels: dict[str, Levels], surveys: Sequence[dict[str, Any] | None]) -> Iterator[str]:
    yield "## The rules for a change of defaults"
    yield ""
    yield 'PLAN.md, "What would make us change a default". Scores, unless something else is said.'
    yield ""
    yield (
        "**Rule 1**: a reading is better than ours and than its own control, both intervals above "
        f"0 and at least {_IMPROVED} of 10 seeds improved. What holds here has to hold again on "
        "the confirmation seeds."
    )
    yield ""
    yield f"| reading | comparison | {_MEASURED} | holds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    better = []
    ours = {f"ours {label}": rows for label, rows in levels["ablation-ours"].items()}
    for reading in READINGS:
        if reading == "ours":
            continue
        rows, hold = levels[f"ablation-{reading}"] | ours, []
        for other, name in (("ours both", "ours, both"), ("control", "its control")):
            values = _scores(rows, f"both − {other}")
            found = difference(values, level=LEVEL)
            hold.append(found.above and found.improved >= _IMPROVED)
            yield f"| {reading} | both − {name} | {_cells(values)} | {_yes(hold[-1])} |"
        better += [reading] * all(hold)
    yield ""
    yield f"Both hold for: {', '.join(better) or 'none'}."
    yield ""
    yield from _rule_2([survey for survey in surveys if survey])
    yield (
        "**Rules 3 and 4** need P1 and P2 above; and random weights of the same spread are "
        "offered as an option where they are better than DPO, the interval above 0:"
    )
    yield ""
    yield f"| comparison | {_MEASURED} | holds |"
    yield "| --- | --- | --- | --- | --- |"
    values = _scores(levels["controls"], label := "random weights − DPO")
    yield f"| {label} | {_cells(values)} | {_yes(difference(values, level=LEVEL).above)} |"
    yield ""
    yield _NARROW
    yield ""


def _rule_2(surveys: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "**Rule 2**: another null prompt or estimator that needs no other data gives I_w − I_l "
        f"the marginal's sign for at least {_POINTS} points more of the pairs than scaffold, "
        "pointwise does, on every seed."
    )
    yield ""
    yield f"| null prompt, estimator | points more: {_MEASURED} | least of the seeds | holds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for way in surveys[0]["agreement"] if surveys else ():
        if way == "scaffold, pointwise":
            continue
        signs = [{name: 100 * of["sign"] for name, of in s["agreement"].items()} for s in surveys]
        more = [of[way] - of["scaffold, pointwise"] for of in signs]
        holds = _yes(min(more) >= _POINTS)
        if way.startswith("marginal"):
            holds = "needs other data"
        yield f"| {way} | {_cells(more)} | {min(more):+.1f} | {holds} |"
    yield ""


def readings(levels: dict[str, Levels]) -> Iterator[str]:
    """Which comes nearest to the paper's pattern, which helps most over its control."""
    yield "## The readings side by side (score)"
    yield ""
    yield (
        "BW: the balance weights alone; SF: the scaling factor alone; both: B-DPO; control: both, "
        "with the MI shuffled within types. Interaction: (both − DPO) − (BW − DPO) − (SF − DPO). "
        "The paper's pattern, in four parts (H4): BW is above DPO, SF above BW, both above DPO, "
        "the interaction above 0; in brackets, the parts whose 95 % interval is above 0 too."
    )
    yield ""
    columns = {
        "BW − DPO": {"BW": 1, "DPO": -1},
        "SF − DPO": {"SF": 1, "DPO": -1},
        "SF − BW": {"SF": 1, "BW": -1},
        "both − DPO": {"both": 1, "DPO": -1},
        "interaction": {"both": 1, "BW": -1, "SF": -1, "DPO": 1},
        "both − its control": {"both": 1, "control": -1},
    }
    pattern = ("BW − DPO", "SF − BW", "both − DPO", "interaction")
    yield f"| reading | {' | '.join(columns)} | pattern, of 4 | mean scale | sd of the weights |"
    yield f"| --- |{' --- |' * (len(columns) + 3)}"
    means, over = {}, {}
    for reading in READINGS:
        rows = levels[f"ablation-{reading}"]
        found = {
            name: difference(paired(Contrast(name, parts), rows, "score", 100))
            for name, parts in columns.items()
        }
        means[reading] = sum(found[name].mean > 0 for name in pattern)
        clear = sum(found[name].above for name in pattern)
        over[reading] = found["both − its control"]
        done = [row for row in rows["both"] if row]
        facts = [_mean(done, name) for name in ("scale", "weight_sd")]
        cells = [*(f.text() for f in found.values()), f"{means[reading]} ({clear})", *facts]
        yield f"| {reading} | {' | '.join(cells)} |"
    yield ""
    nearest = [r for r, parts in means.items() if parts == max(means.values())]
    yield f"Nearest to the paper's pattern, by the means: {', '.join(nearest)}."
    if helps := {r: found for r, found in over.items() if found.seeds}:
        best = max(helps, key=lambda r: helps[r].mean)
        clear = [r for r in helps if helps[r].above]
        yield f"Most over its control: {best}, {helps[best].text()}."
        yield f"Over its control with an interval above 0: {', '.join(clear) or 'none'}."
        whole = [r for r in clear if means[r] == len(pattern)]
        yield f"That, and the whole pattern by the means: {', '.join(whole) or 'none'}."
    yield "The best of seven is chosen after looking: it is no estimate of what it would do again."
    yield ""


def _scores(levels: Levels, label: str) -> list[float]:
    """The differences of the score, by a label "ROW − ROW"."""
    one, other = label.split(" − ")
    return paired(Contrast(label, {one: 1, other: -1}), levels, "score", 100)


def _cells(values: list[float]) -> str:
    """A difference by three ways: :data:`_MEASURED`."""
    low, high = student(values, level=LEVEL)
    interval = f"[{low:+.1f}, {high:+.1f}]" if len(values) > 1 else "–"
    p = f"{sign_flip(values):.3f}" if values else "–"
    return f"{difference(values, level=LEVEL).text()} | {interval} | {p}"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{fmean(values):.2f}" if values else "–"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
