"""The tables of a preset, from the records that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from bdpo_plugin.atomic import write_whole
from studies.real_models.analysis import (
    AUC,
    CHOICE,
    HELD_OUT,
    HELD_OUT_MARGIN,
    MARGIN,
    MEASURES,
    Difference,
    Measure,
    Record,
    Records,
    after_epoch,
    by_seed,
    difference,
    labelled,
    level,
    measures_of,
    read_all,
    read_records,
    there,
    tuning_score,
)
from studies.real_models.design import NAMES, Preset
from studies.real_models.figures import TRAINING_MARGIN, draw
from studies.real_models.judge import Judge
from studies.real_models.tasks import missing

COMPARISONS = (
    ("bdpo", "dpo"),
    ("bdpo", "shuffled-label"),
    ("bdpo", "shuffled"),
    ("bdpo", "random"),
    ("shuffled-label", "dpo"),
    ("random", "dpo"),
    ("bw", "dpo"),
    ("sf", "dpo"),
    ("bdpo", "dpo-low"),
    ("bdpo", "dpo-high"),
    ("safedpo", "dpo"),
    ("imbalanced", "balanced"),
    ("one-half", "other-half"),
    ("dpo", "untrained"),
)


class Claim(NamedTuple):
    """Of a plan, on the measures of one arm less those of another.

    Attributes:
        sign: the side of 0 on which it sees the difference; 0 for either.
        control: two arms whose difference has to be smaller.
    """

    name: str
    sign: int = 0
    control: tuple[str, str] | None = None


_HALVES, _BY_CHANCE = ("imbalanced", "balanced"), ("one-half", "other-half")
#: Plan -> measures and comparisons that it names. Claims without a sign are two-sided, and decided
#: when all runs are there.
CLAIMS: dict[str, tuple[Sequence[Measure], dict[tuple[str, str], Claim]]] = {
    "PLAN.md": (
        (CHOICE,),
        {
            ("bdpo", "dpo"): Claim("P1", 1),
            ("bdpo", "shuffled-label"): Claim("P2", 1),
            _HALVES: Claim("P4", -1, _BY_CHANCE),
        },
    ),
    "PLAN-2.md": (
        (AUC, MARGIN),
        {
            ("safedpo", "dpo"): Claim("Q0"),
            ("bdpo", "dpo"): Claim("Q1"),
            ("bdpo", "shuffled-label"): Claim("Q2"),
        },
    ),
    "": ((), {}),
}
_TRAINING = {
    "loss": ("train_loss", 1),
    "margin [nats]": ("train_margin", 1),
    "accuracy [%]": ("train_accuracy", 100),
    "chosen, log-ratio [nats]": ("train_chosen", 1),
}
#: Shown after each of several epochs.
_OVER_EPOCHS = (AUC, MARGIN, HELD_OUT, HELD_OUT_MARGIN, TRAINING_MARGIN)


def write(folder: Path, preset: Preset, name: str) -> Path:
    """``tables.md`` and the figures in the folder of the records.

    Returns:
        the path of the tables.
    """
    records = read_records(folder)
    lines = [*_head(records, preset, name)]
    trained = any(arm != "untrained" for arm in records)
    ends = {epoch: after_epoch(records, epoch) for epoch in preset.after if trained}
    for epoch, found in ends.items():
        lines += _levels(found, f"Each arm after {epoch} epochs")
    if preset.answered:
        lines += _levels(records, "Each arm")
    at_end = records if preset.answered or not ends else [*ends.values()][-1]
    lines += _differences(at_end, preset)
    if len(ends) > 1:
        lines += _over_epochs(ends)
    lines += _training(records)
    file = folder / "tables.md"
    write_whole(file, "\n".join(lines) + "\n")
    draw(at_end if trained else {}, folder, preset.after)
    return file


def write_tuning(folder: Path, untrained: Record | None) -> Path:
    """``tables.md`` of the settings of plain DPO, the best one first."""
    found = read_all(folder)
    lines = [
        "# Tuning of plain DPO",
        "",
        f"Answers are judged by `judge.py`. {_agreement(found)}",
        "",
    ]
    lines += [f"| SFT | rate | beta | epochs | score | {' | '.join(m.name for m in MEASURES)} |"]
    lines += [f"| --- | --- | --- | --- | --- |{' --- |' * len(MEASURES)}"]
    if untrained:
        lines.append(_row(["before training", "", "", ""], untrained))
    for record in sorted(found, key=tuning_score, reverse=True):
        training = record["training"]
        lines.append(_row([f"{training[k]:g}" for k in ("sft", "rate", "beta", "epochs")], record))
    file = folder / "tables.md"
    write_whole(file, "\n".join(lines) + "\n")
    return file


def _row(cells: list[str], record: Record) -> str:
    cells = [*cells, f"{tuning_score(record):.1f}"]
    before = record["arm"] == "untrained"
    cells += [
        "–" if before and m.relative else f"{level(record, m):.{m.decimals}f}" for m in MEASURES
    ]
    return f"| {' | '.join(cells)} |"


def _arms(records: Records) -> list[str]:
    return [arm for arm in NAMES if arm in records] + _grid(records)


def _grid(records: Records) -> list[str]:
    """The arms of the grid, by alpha, then by beta."""

    def place(arm: str) -> tuple[float, float]:
        settings = next(iter(records[arm].values()))["settings"]
        return settings["bdpo_alpha"], settings["beta"]

    return sorted((arm for arm in records if arm not in NAMES), key=place)


def _head(records: Records, preset: Preset, name: str) -> Iterator[str]:
    wanted, done = sum(1 for _ in preset.jobs()), sum(map(len, records.values()))
    training = preset.training
    source = f"{training.hh} of the file {preset.data}"
    if not preset.data:
        source = f"{training.xstest} pairs of XSTest and {training.hh} of hh-rlhf"
    yield f"# {name}"
    yield ""
    yield (
        f"{done} of {wanted} runs{'' if done == wanted else ': **an unfinished study**'}. "
        f"{preset.model}, {preset.dtype}, LoRA of rank {training.rank}; {source}, "
        f"{training.epochs} epochs, rate {training.rate:g}, beta {training.beta:g}, SFT term "
        f"{training.sft:g}. "
        + (
            f"What is measured and how: [{preset.plan}](../../{preset.plan})."
            if preset.plan
            else "No plan was written beforehand."
        )
    )
    yield ""
    if done < wanted:
        yield (
            f"**{_whole(records, preset)} of {len(preset.seeds)} seeds have all the arms of the "
            "plan's claims. Nothing is decided before all seeds have.**"
        )
        yield ""
    if preset.answered:
        runs = [record for of_arm in records.values() for record in of_arm.values()]
        yield f"Answers are judged by `judge.py`. {_agreement(runs)}"
        yield ""
    if preset.data:
        yield (
            "Not measured by us, the makers of bdpo-plugin, but by whoever ran this command. Of "
            "the paper's evaluations these are missing: "
            + "; ".join(f"{what} ({why})" for what, why in missing().items())
            + "."
        )
        yield ""


def _whole(records: Records, preset: Preset) -> int:
    """How many seeds have all their arms."""
    return sum(all(seed in records.get(arm, {}) for arm in preset.arms) for seed in preset.seeds)


def _agreement(records: Sequence[Record]) -> str:
    """How far the judge agrees with people, in a sentence to stand beside every table."""
    found = Judge.agreement()["xstest"]
    with_types, without = (
        [100 * of_model[key]["refused_or_not"] for of_model in found]
        for key in ("judge", "types_too")
    )
    answers, alike = labelled(records)
    here = (
        f" Of the {answers} answers of a run of this preset that a reader labelled before the "
        f"judge read them it says {alike} the same."
    )
    return (
        f"On refused or not it agrees with people in {min(with_types):.0f} to "
        f"{max(with_types):.0f} % of the answers of a model that it has not seen, in "
        f"{min(without):.0f} to {max(without):.0f} % where it has not seen the type of prompt "
        "either, and misses soft refusals of a small model: "
        "[the judge](../../README.md#the-judge)."
    ) + (here if answers else "")


def _levels(records: Records, title: str) -> Iterator[str]:
    measures = measures_of(records)
    yield f"## {title}"
    yield ""
    yield (
        "The mean over the seeds, and in brackets the standard deviation over them. Arms of other "
        "seeds do not compare here: see the differences."
    )
    yield ""
    yield f"| | {' | '.join(m.name for m in measures)} | seeds |"
    yield f"| --- |{' --- |' * (len(measures) + 1)}"
    for arm in _arms(records):
        cells = []
        for measure in measures:
            values = [level(r, measure) for r in records[arm].values() if there(r, measure)]
            if not values or (measure.relative and arm == "untrained"):
                cells.append("–")
                continue
            spread = f" ({stdev(values):.{measure.decimals}f})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{measure.decimals}f}{spread}")
        yield f"| {NAMES.get(arm, arm)} | {' | '.join(cells)} | {len(records[arm])} |"
    yield ""


def _differences(records: Records, preset: Preset) -> Iterator[str]:
    pairs = [*COMPARISONS, *((arm, "dpo") for arm in _grid(records))]
    measures, claims = CLAIMS[preset.plan]
    claimed = [claim.name for p, claim in claims.items() if all(arm in records for arm in p)]
    of = ", ".join(measure.name.partition(" [")[0] for measure in measures)
    yield "## Differences"
    yield ""
    yield (
        "The mean over the seeds that both arms have, with 95 % over prompts (bootstrap) and 95 % "
        "over seeds (Student's t), and the least effect that would be seen in four of five such "
        "studies, by both. "
        + (f"The plan's claims, of {of}: {', '.join(claimed) or '–'}. " if of else "")
        + "All else in this list is exploratory and not corrected for its number."
    )
    whole = _whole(records, preset) == len(preset.seeds)
    for ours, others in pairs:
        if not (ours in records and others in records):
            continue
        yield ""
        yield f"**{NAMES.get(ours, ours)} − {NAMES.get(others, others)}**"
        yield ""
        second = records[others]
        if others == "untrained":  # one for all seeds
            second = dict.fromkeys(records[ours], *second.values())
        for measure in measures_of(records):
            if measure.relative and others == "untrained":
                continue
            if found := difference(records[ours], second, measure):
                claim = claims.get((ours, others)) if measure in measures else None
                mark = _verdict(claim, found, records, whole) if claim else ""
                yield f"- {measure.name}: {found.text(measure.decimals)}{mark}"
    yield ""


def _verdict(claim: Claim, found: Difference, records: Records, whole: bool) -> str:
    if not claim.sign:
        seen = "above 0" if found.holds() else "below 0" if found.holds(-1) else "not seen"
        return f" — **{claim.name}: {seen if whole else 'not decided'}**"
    holds = found.holds(claim.sign)
    if claim.control:
        holds &= _smaller(_by_seed(records, claim.control, CHOICE), found.mean)
    return _told(claim.name, holds)


def _over_epochs(ends: dict[int, Records]) -> Iterator[str]:
    """Of each comparison the differences after each of the epochs."""
    yield "## Over the epochs"
    yield ""
    yield "The same differences after fewer epochs of the same trainings: all exploratory."
    yield ""
    yield f"| | epochs | {' | '.join(measure.name for measure in _OVER_EPOCHS)} |"
    yield f"| --- | --- |{' --- |' * len(_OVER_EPOCHS)}"
    for ours, others in COMPARISONS:
        for epoch, records in ends.items():
            if "untrained" in (ours, others) or not (ours in records and others in records):
                continue
            both = [*records[ours].values(), *records[others].values()]
            found = [
                (m, difference(records[ours], records[others], m))
                if all(there(run, m) for run in both)
                else (m, None)
                for m in _OVER_EPOCHS
            ]
            cells = [gap.text(m.decimals) if gap else "–" for m, gap in found]
            yield f"| {NAMES[ours]} − {NAMES[others]} | {epoch} | {' | '.join(cells)} |"
    yield ""


def _told(claim: str, holds: bool) -> str:
    return f" — **{claim} {'holds' if holds else 'does not hold'}**"


def _by_seed(records: Records, arms: tuple[str, str], measure: Measure) -> list[float]:
    return by_seed(*(records.get(arm, {}) for arm in arms), measure)


def _smaller(by_chance: list[float], mean: float) -> bool:
    """Whether there is a control, and its mean, of either sign, is smaller than this one."""
    return bool(by_chance) and abs(fmean(by_chance)) < abs(mean)


def _training(records: Records) -> Iterator[str]:
    yield "## What was trained"
    yield ""
    yield (
        "Means of the last epoch over the seeds, margins and log-ratios without beta; the weights "
        "of the chosen answers, lowest and highest; the mean absolute difference of the mutual "
        "information of chosen and rejected, where it was recorded; minutes of a training and its "
        "evaluation."
    )
    yield ""
    yield f"| | {' | '.join(_TRAINING)} | weight of chosen | imbalance [nats/token] | minutes |"
    yield f"| --- |{' --- |' * (len(_TRAINING) + 3)}"
    for arm in _arms(records):
        if arm == "untrained":
            continue
        of_arm = list(records[arm].values())
        cells = [f"{f * fmean(r[key] for r in of_arm):.3g}" for key, f in _TRAINING.values()]
        weights = [weight for record in of_arm for weight in record["weight_chosen"]]
        cells.append(f"{min(weights):.2f} to {max(weights):.2f}")
        gaps = [abs(gap) for record in of_arm for gap in record.get("imbalance", [])]
        cells.append(f"{fmean(gaps):.2f}" if gaps else "–")
        cells.append(f"{fmean(r['seconds'] for r in of_arm) / 60:.1f}")
        yield f"| {NAMES.get(arm, arm)} | {' | '.join(cells)} |"
    yield ""
    yield from _margins(records)


def _margins(records: Records) -> Iterator[str]:
    """P3: the reward margins of training of the halves, seed by seed, beside halves by chance."""
    of_halves, of_chance = (_by_seed(records, p, TRAINING_MARGIN) for p in (_HALVES, _BY_CHANCE))
    if not (of_halves and of_chance):
        return
    holds = min(of_halves) > 0 and _smaller(of_chance, fmean(of_halves))
    told = ", ".join(f"{value:+.2f}" for value in of_halves)
    chance = ", ".join(f"{value:+.2f}" for value in of_chance)
    yield (
        f"Margin of training [nats], imbalanced − balanced, of each seed: {told}; of the halves "
        f"by chance: {chance}{_told('P3', holds)}"
    )
    yield ""
