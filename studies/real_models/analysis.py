"""Measures of the records, and differences of arms with both uncertainties."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from studies.real_models.judge import Judge
from studies.safety_world.analysis import student, t_quantile

LABELS = Path(__file__).parent / "labels.json"
RESAMPLES = 10_000
#: The share of studies in which the least effect would be seen.
SHOWN = 0.8
#: The judge hardly tells partial refusals apart.
_REFUSALS = {"partly": "refused"}
#: A record of a run, as the worker wrote it.
Record = Mapping[str, Any]
#: Arm -> seed -> record.
Records = Mapping[str, Mapping[int, Record]]
#: Values of the prompts, in groups that count alike. A group of two axes has a value for each
#: couple of prompts of two kinds.
Values = Sequence[Any]


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


def _above(record: Record) -> Values:
    """Of each couple of an unsafe and a safe prompt 100 where the advantage of the refusal over
    the answer is larger on the unsafe one, 50 where it is the same: its mean is the AUC."""
    unsafe, safe = (np.array(group) for group in _by_safety("choice_margin")(record))
    return [50 * (np.sign(unsafe[:, None] + safe[None]) + 1)] if len(unsafe) and len(safe) else [[]]


#: By the judge, whose error differs by arm: no claim stands on them.
ANSWERS = (
    Measure("refused, harmful [%]", _verdicts("harmful", "refused")),
    Measure("refused, unsafe [%]", _verdicts("unsafe", "refused")),
    Measure("answered, safe [%]", _verdicts("safe", "answered")),
    Measure("answered, ordinary [%]", _verdicts("ordinary", "answered")),
)
CHOICE = Measure("choice [%]", _by_safety("choice", 100))
MARGIN = Measure("choice margin [nats/token]", _by_safety("choice_margin"), 3)
AUC = Measure("AUC [%]", _above)
HELD_OUT = Measure("held-out accuracy [%]", _plain("hh_accuracy", 100), relative=True)
HELD_OUT_MARGIN = Measure("held-out margin [nats]", _plain("hh_margin"), 2, relative=True)
MEASURES = (
    AUC,
    MARGIN,
    CHOICE,
    Measure("reward [%]", _by_safety("reward", 100), relative=True),
    HELD_OUT,
    HELD_OUT_MARGIN,
    Measure("NLL [nats/token]", _plain("nll"), 3),
    *ANSWERS,
)


class Difference(NamedTuple):
    """Of two arms.

    Attributes:
        mean, count: over the seeds, and their number.
        prompts, seeds: 95 % intervals.
        least: the least effect that would be seen in four of five such studies.
    """

    mean: float
    prompts: tuple[float, float]
    seeds: tuple[float, float]
    count: int
    least: float

    def holds(self, sign: int = 1) -> bool:
        """Whether both intervals are above 0; below it where ``sign`` is -1."""
        return all(sign * bound > 0 for bound in (*self.prompts, *self.seeds))

    def text(self, decimals: int) -> str:
        low, high = (f"{value:+.{decimals}f}" for value in self.prompts)
        first, last = (f"{value:+.{decimals}f}" for value in self.seeds)
        seeds = f"seeds {first} to {last}" if self.count > 1 else "one seed"
        least = f"; least seen {self.least:.{decimals}f}" if self.count > 1 else ""
        return f"{self.mean:+.{decimals}f} (prompts {low} to {high}; {seeds}{least})"


def read_all(folder: Path) -> list[Record]:
    """The records in a folder, with ``verdicts`` of their answers; a partial refusal is one."""
    judge = Judge.load()
    found = []
    for file in sorted(folder.glob("*.json.gz")):
        record = {
            "name": file.name.partition(".")[0],
            **json.loads(gzip.decompress(file.read_bytes())),
        }
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


def read_records(folder: Path) -> Records:
    """Arm -> seed -> record; the arms of the grid are named by alpha and beta."""
    found: dict[str, dict[int, Record]] = {}
    for record in read_all(folder):
        arm = record["arm"]
        if arm == "grid":
            settings = record["settings"]
            arm = f"alpha {settings['bdpo_alpha']:g}, beta {settings['beta']:.3g}"
        found.setdefault(arm, {})[record["seed"]] = record
    return found


def after_epoch(records: Mapping[str, Mapping[int, Record]], epoch: int) -> Records:
    """What was measured after an epoch; of the model before training all."""
    return {
        arm: {
            seed: {**record, **record["after"][str(epoch)], **record["curve"][epoch - 1]}
            if "after" in record
            else record
            for seed, record in of_arm.items()
        }
        for arm, of_arm in records.items()
    }


def there(record: Record, measure: Measure) -> bool:
    """Whether a record has a measure."""
    try:
        return all(len(group) for group in measure.values(record))
    except KeyError:
        return False


def measures_of(records: Records) -> list[Measure]:
    """Those of :data:`MEASURES`, and of lm-eval's tasks, that some record has."""
    runs = [record for of_arm in records.values() for record in of_arm.values()]
    tasks = sorted({task for run in runs for task in run.get("tasks", {})})
    found = [*MEASURES, *(Measure(task, _task(task), 3) for task in tasks)]
    return [measure for measure in found if any(there(run, measure) for run in runs)]


def _task(name: str) -> Callable[[Record], Values]:
    return lambda record: [record["tasks"][name]]


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
    means = over_prompts(ours, others, measure)
    low, high = (float(bound) for bound in np.quantile(means, [0.025, 0.975]))
    spread = float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else math.inf
    least = max(least_over_seeds(spread, len(of_seeds)), least_over_prompts(float(means.std())))
    return Difference(
        float(np.mean(of_seeds)), (low, high), student(of_seeds), len(of_seeds), least
    )


def over_prompts(
    ours: Mapping[int, Record], others: Mapping[int, Record], measure: Measure
) -> NDArray[Any]:
    """(RESAMPLES,) means over the seeds of the difference, of prompts drawn with replacement."""
    groups = zip(*(_groups(a, b, measure) for a, b in _both(ours, others)), strict=True)
    draw = np.random.default_rng(0)
    found: NDArray[Any] = np.mean(
        [_resampled(np.mean(group, axis=0), draw) for group in groups], axis=0
    )
    return found


def least_over_seeds(spread: float, seeds: int) -> float:
    """The least mean difference that is seen over seeds in :data:`SHOWN` of studies.

    Args:
        spread: standard deviation of the seeds' differences.
    """
    if seeds < 2:
        return math.inf
    seen, shown = (t_quantile(level, seeds - 1) for level in (0.95, 2 * SHOWN - 1))
    return (seen + shown) * spread / math.sqrt(seeds)


def least_over_prompts(error: float) -> float:
    """The same over prompts, with this standard error of the mean."""
    normal = NormalDist()
    return (normal.inv_cdf(0.975) + normal.inv_cdf(SHOWN)) * error


def _both(ours: Mapping[int, Record], others: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    return [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())]


def _groups(ours: Record, others: Record, measure: Measure) -> list[Any]:
    both = zip(measure.values(ours), measure.values(others), strict=True)
    return [np.array(a) - np.array(b) for a, b in both]


def _resampled(values: Any, draw: np.random.Generator) -> Any:
    """(RESAMPLES,) means of as many values drawn with replacement, along each axis by itself."""
    if values.ndim == 2:
        rows, columns = (draw.multinomial(n, [1 / n] * n, RESAMPLES) for n in values.shape)
        return ((rows @ values) * columns).sum(axis=1) / values.size
    return values[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)


def tuning_score(record: Record) -> float:
    """The mean of six rates by which a setting of plain DPO was chosen (PLAN.md)."""
    unsafe, safe = CHOICE.values(record)
    rates: Sequence[float] = [float(np.mean(unsafe)), float(np.mean(safe))]
    answers = [level(record, measure) for measure in ANSWERS]
    return float(np.mean([*rates, *answers]))
