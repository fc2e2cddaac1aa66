"""What is run: every experiment as its rows, each row as one run for each seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from studies.safety_world.design import Contrast, Experiment, Row
from studies.safety_world.runner import Job, train_job
from studies.safety_world.train import Spec
from studies.safety_world.weighting import READINGS
from studies.safety_world.world import MEMORISED

#: DPO's own best on the tuning seeds; PLAN.md, "Tuning".
BETA, LEARNING_RATE, EPOCHS = 3.0, 1e-4, 4
MAIN = {"beta": BETA, "learning_rate": LEARNING_RATE, "epochs": EPOCHS}

FINAL_SEEDS = tuple(range(10))
TUNING_SEEDS = (900, 901, 902)
CONFIRMATION_SEEDS = tuple(range(10, 20))

METHODS = {"DPO": "dpo", "B-DPO": "ours:both", "control": "ours:within"}


@dataclass(frozen=True)
class Size:
    """How large the experiments are: in full, or to be seen in minutes."""

    seeds: tuple[int, ...] = FINAL_SEEDS
    common: tuple[tuple[str, Any], ...] = ()  # fields of every Spec
    alphas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    betas: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    shares: tuple[int, ...] = (0, 50, 100)
    noises: tuple[int, ...] = (10, 30)
    sizes: tuple[int, ...] = (32, 512)
    long: int = 16
    looks: tuple[int, ...] = (1, 2, 4, 8, 16)
    survey: tuple[int, int, int] = (512, 96, 64)  # pool, compared, queries

    def spec(self, method: str, **fields: Any) -> Callable[[int], Spec]:
        values = {**MAIN, "method": method, **dict(self.common), **fields}
        return lambda seed: Spec(seed=seed, **values)

    def as_many_steps(self, pairs: int) -> dict[str, int]:
        """Fields of a run with `pairs` pairs and as many steps as the main setting's."""
        main = self.spec("dpo")(0)
        return {"pairs": pairs, "epochs": max(1, main.pairs * main.epochs // pairs)}


FULL = Size()
CONFIRMATION = Size(seeds=CONFIRMATION_SEEDS)
TUNING = Size(seeds=TUNING_SEEDS)
QUICK = Size(
    seeds=TUNING_SEEDS[:1],
    common=(("pairs", 64), ("epochs", 2), ("queries", 12), ("steps", 500)),
    alphas=(0.5, 1.5, 3.0),
    betas=(1.0, 3.0),
    shares=(0, 100),
    noises=(30,),
    sizes=(32,),
    long=2,
    looks=(1, 2),
    survey=(64, 24, 16),
)


def experiments(size: Size) -> list[Experiment]:
    """Experiments 2 to 5 of PLAN.md; experiment 1 trains nothing."""
    return [
        pretrained(size),
        _subsets(size),
        _alpha(size),
        _controls(size),
        *(_reading(size, reading) for reading in READINGS),
        _three(size, "imbalance", "Share of imbalanced pairs", _imbalanced(size)),
        _three(
            size,
            "noise",
            "Label noise",
            {f"{n} % swapped": {"data": f"noise {n}"} for n in size.noises},
        ),
        _three(
            size,
            "pairs",
            "Size of the preference set, at as many steps",
            {f"{n} pairs": size.as_many_steps(n) for n in size.sizes},
        ),
        _memorised(size),
        _epochs(size),
    ]


def pretrained(size: Size) -> Experiment:
    """The model that all runs start from."""
    rows = (Row("pretrained", size.spec("base")),)
    return Experiment("base", "Before preference training", rows)


def stages(size: Size, tables: Sequence[Experiment]) -> list[list[Job]]:
    """Pretraining, then all else, seed by seed, the longest runs of a seed first."""
    models: list[Job] = []
    later: list[Job] = []
    for seed in size.seeds:
        spec = size.spec("base")(seed)
        model = {"seed": seed, "steps": spec.steps, "hidden": spec.hidden}
        models.append(Job("pretrain", model))
        later.append(survey_job(size, seed))
        specs = dict.fromkeys(row.spec(seed) for table in tables for row in table.rows)
        later += map(train_job, sorted(specs, key=lambda spec: -spec.epochs * spec.pairs))
    return [models, later]


def survey_job(size: Size, seed: int) -> Job:
    """Experiment 1."""
    spec = size.spec("base")(seed)
    pool, compared, queries = size.survey
    sizes = {"pool": pool, "compared": compared, "queries": queries}
    return Job("survey", {"seed": seed, "steps": spec.steps, "hidden": spec.hidden} | sizes)


def tuning() -> Experiment:
    """DPO's beta, learning rate and epochs, on the tuning seeds; PLAN.md, "Tuning"."""
    looks = (2, 4, 8)
    rows = (
        Row(
            f"beta {beta:g}, rate {rate:g}",
            Size().spec("dpo", beta=beta, learning_rate=rate, epochs=max(looks), looks=looks),
        )
        for beta in (0.3, 1.0, 3.0)
        for rate in (5e-5, 1e-4, 2e-4)
    )
    return Experiment("tuning", "DPO on the tuning seeds", tuple(rows), looks=looks)


def _imbalanced(size: Size) -> dict[str, dict[str, Any]]:
    return {f"{n} % imbalanced": {"data": f"imbalanced {n}"} for n in size.shares}


def _subsets(size: Size) -> Experiment:
    (balanced, first), *_, (imbalanced, last) = _imbalanced(size).items()
    rows = (
        Row(balanced, size.spec("dpo", **first)),
        Row(imbalanced, size.spec("dpo", **last), (balanced,)),
    )
    return Experiment("subsets", "DPO on balanced and imbalanced pairs (Figures 3, 4)", rows)


def _alpha(size: Size) -> Experiment:
    rows = []
    for factor in size.betas:
        beta = BETA * factor
        zero = f"beta {beta:.2g}, DPO"
        rows.append(Row(zero, size.spec("dpo", beta=beta)))
        label = f"beta {beta:.2g}, control at alpha 1.5"
        rows.append(Row(label, size.spec("ours:within", beta=beta), (zero,)))
        for alpha in size.alphas:
            against = (zero, label) if alpha == 1.5 else (zero,)
            spec = size.spec("ours:both", beta=beta, alpha=alpha)
            rows.append(Row(f"beta {beta:.2g}, alpha {alpha:g}", spec, against))
    middle = f"beta {BETA:.2g}, alpha 1.5"
    ends = {f"alpha {alpha:g}" for alpha in (min(size.alphas), max(size.alphas))}
    more = [
        Contrast(f"{middle} − {end}", {middle: 1, f"beta {BETA:.2g}, {end}": -1}, added=True)
        for end in sorted(ends)
    ]
    return Experiment("alpha", "alpha and beta (Figure 5)", tuple(rows), tuple(more))


def _controls(size: Size) -> Experiment:
    rows = [Row("DPO", size.spec("dpo"))]
    names = {
        "MI shuffled across pairs": "shuffled",
        "MI shuffled within types": "within",
        "MI swapped within pairs": "swapped",
        "random weights": "random",
        "mean weights": "constant",
    }
    for label, variant in names.items():
        rows.append(Row(label, size.spec(f"ours:{variant}"), ("DPO",)))
    rows.append(Row("B-DPO", size.spec("ours:both"), ("DPO", *names)))
    return Experiment("controls", "B-DPO and its controls", tuple(rows))


def _reading(size: Size, reading: str) -> Experiment:
    rows = (
        Row("DPO", size.spec("dpo")),
        Row("BW", size.spec("ours:bw" if reading == "outside" else f"{reading}:bw"), ("DPO",)),
        Row("SF", size.spec(f"{reading}:sf"), ("DPO",)),
        Row("control", size.spec(f"{reading}:within"), ("DPO",)),
        Row("both", size.spec(f"{reading}:both"), ("DPO", "control")),
    )
    more = (
        Contrast(
            "(both − DPO) − (BW − DPO) − (SF − DPO)", {"both": 1, "BW": -1, "SF": -1, "DPO": 1}
        ),
        Contrast("SF − BW", {"SF": 1, "BW": -1}, added=True),
    )
    return Experiment(f"ablation-{reading}", f"Ablation, reading `{reading}`", rows, more)


def _three(size: Size, name: str, title: str, settings: dict[str, dict[str, Any]]) -> Experiment:
    """DPO, B-DPO and the control under the main setting and each of `settings`."""
    rows = []
    if name in ("noise", "pairs"):
        settings = {"main": {}} | settings
    for setting, fields in settings.items():
        labels = {method: f"{setting}, {method}" for method in METHODS}
        for method, label in labels.items():
            against = (labels["DPO"], labels["control"]) if method == "B-DPO" else ()
            rows.append(Row(label, size.spec(METHODS[method], **fields), against))
    return Experiment(name, title, tuple(rows))


def _memorised(size: Size) -> Experiment:
    fields = size.as_many_steps(MEMORISED)
    settings = {"fresh": fields, "memorised": fields | {"data": "memorised"}}
    made = _three(size, "memorised", "Where MI tracks memorisation", settings)
    extra = Row(
        "memorised, MI swapped within pairs",
        size.spec("ours:swapped", **settings["memorised"]),
        ("memorised, control",),
    )
    parts = {
        "memorised, B-DPO": 1.0,
        "memorised, control": -1.0,
        "fresh, B-DPO": -1.0,
        "fresh, control": 1.0,
    }
    more = Contrast("(B-DPO − control), memorised − fresh", parts)
    return replace(made, rows=(*made.rows, extra), extra=(more,))


def _epochs(size: Size) -> Experiment:
    rows = [
        Row(label, size.spec(method, epochs=size.long, looks=size.looks))
        for label, method in METHODS.items()
    ]
    rows[1] = rows[1]._replace(against=("DPO", "control"))
    early = min(look for look in size.looks if 4 * look >= size.long)
    lost = [
        Contrast(
            f"(epoch {size.long} − epoch {early}), B-DPO − {other}",
            {
                f"B-DPO, epoch {size.long}": 1.0,
                f"B-DPO, epoch {early}": -1.0,
                f"{other}, epoch {size.long}": -1.0,
                f"{other}, epoch {early}": 1.0,
            },
        )
        for other in ("DPO", "control")
    ]
    lost += [
        Contrast(
            f"epoch {size.long} − epoch {early}, {method}",
            {f"{method}, epoch {size.long}": 1, f"{method}, epoch {early}": -1},
            added=True,
        )
        for method in METHODS
    ]
    return Experiment("epochs", "Many epochs", tuple(rows), tuple(lost), size.looks)
