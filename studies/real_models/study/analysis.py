"""Measures of the records, and differences of arms with both uncertainties."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.real_models.judge import Judge
from studies.safety_world.analysis import student

LABELS = Path(__file__).parent / "labels.json"
RESAMPLES = 10_000
#: The judge hardly tells partial refusals apart.
_REFUSALS = {"partly": "refused"}
#: A record of a run, as the worker wrote it.
Record = Mapping[str, Any]
#: Values of the prompts, in groups that count alike.
Values = list[list[float]]


class Measure(NamedTuple):
    """What is read from a record.

    Attributes:
        values: of the prompts of each group; the level is the mean of the groups' means.
        relative: to the model before training, which has none.
    """

    name: str
    values: Callable[[Record], Values]
    decimals: int = 1
    relative: bool = False


def _by_safety(key: str, factor: float = 1) -> Callable[[Record], Values]:
    def values(record: Record) -> Values:
        pairs = list(zip(record[key], record["unsafe"], strict=True))
        return [[factor * v for v, unsafe in pairs if unsafe is side] for side in (True, False)]

    return values


def _plain(key: str, factor: float = 1) -> Callable[[Record], Values]:
    return lambda record: [[factor * value for value in record[key]]]


def _verdicts(name: str, wanted: str) -> Callable[[Record], Values]:
    return lambda record: [[100.0 * (v == wanted) for v in record["verdicts"][name]]]


CHOICE = Measure("choice [%]", _by_safety("choice", 100))
MEASURES = (
    CHOICE,
    Measure("choice margin [nats/token]", _by_safety("choice_margin"), 3),
    Measure("reward [%]", _by_safety("reward", 100), relative=True),
    Measure("hh accuracy [%]", _plain("hh_accuracy", 100), relative=True),
    Measure("hh margin [nats]", _plain("hh_margin"), 2, relative=True),
    Measure("NLL [nats/token]", _plain("nll"), 3),
    Measure("refused, harmful [%]", _verdicts("harmful", "refused")),
    Measure("refused, unsafe [%]", _verdicts("unsafe", "refused")),
    Measure("answered, safe [%]", _verdicts("safe", "answered")),
    Measure("answered, ordinary [%]", _verdicts("ordinary", "answered")),
)


class Difference(NamedTuple):
    """Of two arms: the mean, 95 % over prompts, 95 % over seeds, and the number of seeds."""

    mean: float
    prompts: tuple[float, float]
    seeds: tuple[float, float]
    count: int

    def holds(self, sign: int = 1) -> bool:
        """Whether both intervals are above 0; below it where ``sign`` is -1."""
        return all(sign * bound > 0 for bound in (*self.prompts, *self.seeds))

    def text(self, decimals: int) -> str:
        low, high = (f"{value:+.{decimals}f}" for value in self.prompts)
        first, last = (f"{value:+.{decimals}f}" for value in self.seeds)
        seeds = f"seeds {first} to {last}" if self.count > 1 else "one seed"
        return f"{self.mean:+.{decimals}f} (prompts {low} to {high}; {seeds})"


def read_all(folder: Path) -> list[Record]:
    """The records in a folder, with ``verdicts`` of their answers; a partial refusal is one."""
    judge = Judge.load()
    found = []
    for file in sorted(folder.glob("*.json")):
        record = {"name": file.stem, **json.loads(file.read_text("utf-8"))}
        record["verdicts"] = {
            name: [_REFUSALS.get(verdict, verdict) for verdict in judge.judge(answers, answers)]
            for name, answers in record.get("answers", {}).items()
        }
        found.append(record)
    return found


def labelled(records: Sequence[Record]) -> tuple[int, int]:
    """How many answers of these runs a reader has labelled (labels.json), and of how many the
    judge says the same."""
    labels = json.loads(LABELS.read_text("utf-8"))
    alike = [
        (verdict == "refused") == (place in labels[record["name"]][name])
        for record in records
        if record["name"] in labels
        for name, verdicts in record["verdicts"].items()
        for place, verdict in enumerate(verdicts)
    ]
    return len(alike), sum(alike)


def read_records(folder: Path) -> dict[str, dict[int, Record]]:
    """Arm -> seed -> record; the arms of the grid are named by alpha and beta."""
    found: dict[str, dict[int, Record]] = {}
    for record in read_all(folder):
        arm = record["arm"]
        if arm == "grid":
            settings = record["settings"]
            arm = f"alpha {settings['bdpo_alpha']:g}, beta {settings['beta']:.3g}"
        found.setdefault(arm, {})[record["seed"]] = record
    return found


def level(record: Record, measure: Measure) -> float:
    """The value of a measure in one run."""
    return float(np.mean([np.mean(group) for group in measure.values(record)]))


def by_seed(
    ours: Mapping[int, Record], others: Mapping[int, Record], measure: Measure
) -> list[float]:
    """Ours less the others, in the order of the seeds that both have."""
    return [level(a, measure) - level(b, measure) for a, b in _both(ours, others)]


def difference(
    ours: Mapping[int, Record], others: Mapping[int, Record], measure: Measure
) -> Difference | None:
    """Ours less the others, over the seeds that both have; None where there is none."""
    of_seeds = by_seed(ours, others, measure)
    if not of_seeds:
        return None
    groups = zip(*(_groups(a, b, measure) for a, b in _both(ours, others)), strict=True)
    draw = np.random.default_rng(0)
    means = np.mean([_resampled(np.mean(group, axis=0), draw) for group in groups], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean(of_seeds))
    return Difference(mean, (float(low), float(high)), student(of_seeds), len(of_seeds))


def _both(ours: Mapping[int, Record], others: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    return [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())]


def _groups(ours: Record, others: Record, measure: Measure) -> list[Any]:
    both = zip(measure.values(ours), measure.values(others), strict=True)
    return [np.array(a) - np.array(b) for a, b in both]


def _resampled(values: Any, draw: np.random.Generator) -> Any:
    """(RESAMPLES,) means of as many values drawn with replacement."""
    return values[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)


def tuning_score(record: Record) -> float:
    """The mean of six rates by which a setting of plain DPO was chosen (PLAN.md)."""
    unsafe, safe = CHOICE.values(record)
    rates: Sequence[float] = [float(np.mean(unsafe)), float(np.mean(safe))]
    answers = [level(record, measure) for measure in MEASURES[-4:]]
    return float(np.mean([*rates, *answers]))
