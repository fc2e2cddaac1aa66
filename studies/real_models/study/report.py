"""The tables and the figure of a preset, from the records that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from studies.real_models.judge import Judge
from studies.real_models.study.analysis import (
    CHOICE,
    MEASURES,
    Difference,
    Measure,
    Record,
    by_seed,
    difference,
    labelled,
    level,
    read_all,
    read_records,
    tuning_score,
)
from studies.real_models.study.design import NAMES, Preset

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
    """Of the plan, on the choice of one arm less that of another.

    Attributes:
        sign: the side of 0 on which it sees the difference.
        control: two arms whose difference has to be smaller.
    """

    name: str
    sign: int = 1
    control: tuple[str, str] | None = None


_HALVES, _BY_CHANCE = ("imbalanced", "balanced"), ("one-half", "other-half")
CLAIMS = {
    ("bdpo", "dpo"): Claim("P1"),
    ("bdpo", "shuffled-label"): Claim("P2"),
    _HALVES: Claim("P4", -1, _BY_CHANCE),
}
_MARGIN = Measure("margin of training [nats]", lambda record: [[record["train_margin"]]], 2)
_TRAINING = {
    "loss": ("train_loss", 1),
    "margin [nats]": ("train_margin", 1),
    "accuracy [%]": ("train_accuracy", 100),
    "chosen, log-ratio [nats]": ("train_chosen", 1),
}
_MARKS = "os^Dv<>PXh"
Records = Mapping[str, Mapping[int, Record]]


def write(folder: Path, preset: Preset, name: str) -> Path:
    """``tables.md`` and ``choice.png`` in the folder of the records.

    Returns:
        the path of the tables.
    """
    records = read_records(folder)
    lines = [*_head(records, preset, name), *_levels(records), *_differences(records)]
    lines += _training(records)
    file = folder / "tables.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(records, folder / "choice.png")
    if preset.alphas:
        _draw_alphas(records, preset.training.beta, folder / "alpha.png")
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
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    wanted, there = sum(1 for _ in preset.jobs()), sum(map(len, records.values()))
    training = preset.training
    yield f"# {name}"
    yield ""
    yield (
        f"{there} of {wanted} runs{'' if there == wanted else ': **not complete**'}. "
        f"SmolLM2-135M-Instruct, {preset.dtype}, LoRA of rank {training.rank}; {training.xstest} "
        f"pairs of XSTest and {training.hh} of hh-rlhf, {training.epochs} epochs, rate "
        f"{training.rate:g}, beta {training.beta:g}, SFT term {training.sft:g}. What is measured "
        "and how: [PLAN.md](../../../PLAN.md)."
    )
    yield ""
    runs = [record for of_arm in records.values() for record in of_arm.values()]
    yield f"Answers are judged by `judge.py`. {_agreement(runs)}"
    yield ""


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
        "[the judge](../../../README.md#the-judge)."
    ) + (here if answers else "")


def _levels(records: Records) -> Iterator[str]:
    yield "## Each arm"
    yield ""
    yield (
        "The mean over the seeds, and in brackets the standard deviation over them. Arms of other "
        "seeds do not compare here: see the differences."
    )
    yield ""
    yield f"| | {' | '.join(m.name for m in MEASURES)} | seeds |"
    yield f"| --- |{' --- |' * (len(MEASURES) + 1)}"
    for arm in _arms(records):
        cells = []
        for measure in MEASURES:
            if measure.relative and arm == "untrained":
                cells.append("–")
                continue
            values = [level(record, measure) for record in records[arm].values()]
            spread = f" ({stdev(values):.{measure.decimals}f})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{measure.decimals}f}{spread}")
        yield f"| {NAMES.get(arm, arm)} | {' | '.join(cells)} | {len(records[arm])} |"
    yield ""


def _differences(records: Records) -> Iterator[str]:
    pairs = [*COMPARISONS, *((arm, "dpo") for arm in _grid(records))]
    claimed = [claim.name for p, claim in CLAIMS.items() if all(arm in records for arm in p)]
    yield "## Differences"
    yield ""
    yield (
        "The mean over the seeds that both arms have, with 95 % over prompts (bootstrap) and 95 % "
        f"over seeds (Student's t). The plan's claims, of choice: {', '.join(claimed) or '–'}. "
        "All else in this list is exploratory and not corrected for its number."
    )
    for ours, others in pairs:
        if not (ours in records and others in records):
            continue
        yield ""
        yield f"**{NAMES.get(ours, ours)} − {NAMES[others]}**"
        yield ""
        # the model before training has one record, which stands beside every seed
        second = records[others]
        if others == "untrained":
            second = dict.fromkeys(records[ours], *second.values())
        for measure in MEASURES:
            if measure.relative and others == "untrained":
                continue
            if found := difference(records[ours], second, measure):
                claim = CLAIMS.get((ours, others)) if measure is CHOICE else None
                mark = _verdict(claim, found, records) if claim else ""
                yield f"- {measure.name}: {found.text(measure.decimals)}{mark}"
    yield ""


def _verdict(claim: Claim, found: Difference, records: Records) -> str:
    holds = found.holds(claim.sign)
    if claim.control:
        holds &= _smaller(_by_seed(records, claim.control, CHOICE), found.mean)
    return _told(claim.name, holds)


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
    of_halves, of_chance = (_by_seed(records, p, _MARGIN) for p in (_HALVES, _BY_CHANCE))
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


def _draw(records: Records, file: Path) -> None:
    """Choice of each arm: a mark for a seed, the same in each arm, and a line at their mean."""
    arms = [arm for arm in NAMES if arm in records]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(arms) + 1.2), layout="constrained")
    for place, arm in enumerate(reversed(arms)):
        values = {seed: level(record, CHOICE) for seed, record in records[arm].items()}
        colour = {"bdpo": "tab:blue", "dpo": "tab:orange"}.get(arm, "tab:gray")
        for seed, value in values.items():
            mark = _MARKS[seed % len(_MARKS)] if arm != "untrained" else "|"
            axes.plot(value, place, mark, color=colour, alpha=0.7)
        axes.plot([fmean(values.values())] * 2, [place - 0.3, place + 0.3], color=colour)
    axes.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)])
    axes.set_xlabel("choice [%]; each mark is a seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_alphas(records: Records, beta: float, file: Path) -> None:
    """The paper's Figure 5: choice and answers by alpha, DPO being 0; a mark for a seed."""
    by_alpha: dict[float, list[Record]] = {}
    for arm in ("dpo", "bdpo", *_grid(records)):
        for record in records.get(arm, {}).values():
            if record["settings"]["beta"] == beta:
                by_alpha.setdefault(record["settings"]["bdpo_alpha"], []).append(record)
    alphas = sorted(by_alpha)
    groups = (MEASURES[:1], MEASURES[-4:-1])
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, measures in zip(panels, groups, strict=True):
        for measure in measures:
            levels = [[level(record, measure) for record in by_alpha[a]] for a in alphas]
            (line,) = axes.plot(alphas, [*map(fmean, levels)], label=measure.name)
            for alpha, of_alpha in zip(alphas, levels, strict=True):
                axes.plot([alpha] * len(of_alpha), of_alpha, "o", color=line.get_color(), alpha=0.5)
        axes.set_xlabel("alpha (0 is DPO); each mark is a seed, the line their mean")
        axes.set_xticks(alphas)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
