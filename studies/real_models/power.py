"""``python -m studies.real_models.power``: what a study of so many seeds can see.

By the spread of the first study: of each comparison the least difference that would be seen in
four of five such studies, two-sided at 5 %, both over seeds (Student's t) and over prompts
(normal).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance

import click

from studies.real_models.analysis import (
    AUC,
    MARGIN,
    Measure,
    Records,
    by_seed,
    least_over_prompts,
    least_over_seeds,
    over_prompts,
    read_records,
)

RESULTS = Path(__file__).parent / "results"
#: The comparisons whose spread is pooled: arms of one beta; the halves and those by chance.
ARMS = (
    *(("bdpo", "dpo"), ("bdpo", "shuffled-label"), ("bdpo", "random")),
    *(("shuffled-label", "dpo"), ("shuffled-label", "random"), ("random", "dpo")),
)
HALVES = (("imbalanced", "balanced"), ("one-half", "other-half"))


def pooled(
    records: Records, pairs: Sequence[tuple[str, str]], measure: Measure
) -> tuple[float, float]:
    """Deviation of a difference over seeds, and the standard error of its mean over prompts."""
    both = [(records[ours], records[others]) for ours, others in pairs]
    seeds = fmean(variance(by_seed(*arms, measure)) for arms in both)
    prompts = fmean(over_prompts(*arms, measure).var() for arms in both)
    return math.sqrt(seeds), math.sqrt(prompts)


@click.command()
@click.option("--seeds", default=14, show_default=True)
@click.option("--prompts", default=105, show_default=True, help="The first study had 87.")
@click.option(
    "--pairs",
    default=32,
    show_default=True,
    help="Trained on. The first study had 96; the deviation over seeds is taken to grow as the "
    "root of their ratio.",
)
def main(seeds: int, prompts: int, pairs: int) -> None:
    """Print the least effects, by the spread of the records of the first study."""
    for preset, compared in (("smollm2-cpu", ARMS), ("smollm2-cpu-halves", HALVES)):
        records = read_records(RESULTS / preset)
        for measure in (AUC, MARGIN):
            spread, error = pooled(records, compared, measure)
            spread *= math.sqrt(96 / pairs)
            error *= math.sqrt(87 / prompts)
            click.echo(
                f"{preset}, {measure.name}: {len(compared)} comparisons, deviation over seeds "
                f"{spread:.3g}; least effect over {seeds} seeds "
                f"{least_over_seeds(spread, seeds):.3g}, over {prompts} prompts "
                f"{least_over_prompts(error):.3g}"
            )


if __name__ == "__main__":
    main()
