"""The schema of the mapping `bdpo_recipe`, and its validation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

import click

from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.run_numbers import QUANTILES, TOLERANCES
from bdpo_plugin.redact import Place
from bdpo_plugin.settings import RECIPE

_NUMBER = (int, float)
_TEXTS = {...: str}
_NUMBERS = [float]

#: Key -> its type, or the keys below it. ``...`` is any key; a list stands for a list of its item.
KEYS: dict[Any, Any] = {
    "title": str,
    "author": str,
    "licence": str,
    "base_model": str,
    "needs": str,
    "processes": int,
    "batch": int,
    "data": {"command": str, "source": str, "revision": str},
    "measured": {"hardware": str, "minutes": float, "memory_gib": float},
    "versions": _TEXTS,
    "verified": [{"by": str, "hardware": str, "date": str}],
    "expected": {
        "seed": int,
        "settings": {...: object},
        "pairs": int,
        "rows": str,
        "chat_template": str,
        "null_prompt": str,
        "model_digest": str,
        "mi_chosen": _NUMBERS,
        "mi_rejected": _NUMBERS,
        "losses": {...: float},
        "tolerance": {"mi": float, "loss": float},
    },
}
_WORDS = {str: "a text", int: "a whole number", float: "a number"}
#: The largest useful tolerances: a loss of 0.5 is most of ln 2, the loss at the start of a run.
_MOST = {"mi": 1.0, "loss": 0.5}


def problems(about: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yields the problems of a mapping `bdpo_recipe`, with their paths."""
    if "title" not in about:
        yield (RECIPE,), "it needs a `title`"
    yield from _problems(about, KEYS, (RECIPE,))
    yield from _expectations(about.get("expected"), (RECIPE, "expected"))


def _expectations(expected: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Yields the problems of expected numbers that have the right types."""
    if not isinstance(expected, dict):
        return
    tolerance, losses = expected.get("tolerance"), expected.get("losses")
    tolerance = tolerance if isinstance(tolerance, dict) else {}
    numbers: dict[str, list[float]] = {"mi": [], "loss": []}
    if isinstance(losses, dict):
        if "loss" not in tolerance:
            yield (*place, "losses"), "need a `tolerance` of the `loss`"
        for step in losses:
            if not isinstance(step, int) or step < 1:
                yield (*place, "losses", step), "must be a step, a whole number from 1"
        numbers["loss"] += [loss for loss in losses.values() if isinstance(loss, _NUMBER)]
    for key in ("mi_chosen", "mi_rejected"):
        values = expected.get(key)
        if isinstance(values, list):
            if len(values) != len(QUANTILES):
                yield (*place, key), f"must be {len(QUANTILES)} numbers, at 5, 50 and 95 %"
            if "mi" not in tolerance:
                yield (*place, key), "needs a `tolerance` of the `mi`"
            numbers["mi"] += [value for value in values if isinstance(value, _NUMBER)]
    for key, most in _MOST.items():
        value = tolerance.get(key)
        if not isinstance(value, _NUMBER) or not math.isfinite(value):
            continue
        # One that a bundle writes is always allowed: it is rounding, however little was learned.
        spread = max(numbers[key]) - min(numbers[key]) if len(numbers[key]) > 1 else most
        useful = min(most, max(spread, TOLERANCES[True][key]))
        if not 0 < value <= useful:
            what = (
                f"must be above 0 and at most {useful:.3g}, not {value}: no run could tell, as the "
                "numbers to expect lie no further apart"
            )
            yield (*place, "tolerance", key), what


def sound(recipe: Recipe) -> Recipe:
    """Returns the recipe, after checking the types in its mapping `bdpo_recipe`.

    Raises:
        click.ClickException: a value has the wrong type, or a key is unknown.
    """
    for place, what in _problems(recipe.about, KEYS, (RECIPE,)):
        raise click.ClickException(f"{recipe.path}: `{'.'.join(map(str, place))}`: {what}")
    return recipe


def _problems(value: Any, wanted: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield place, f"must be a mapping, not {value!r}"
            return
        for key, inner in value.items():
            if key in wanted or ... in wanted:
                yield from _problems(inner, wanted.get(key, wanted.get(...)), (*place, key))
            else:
                near = difflib.get_close_matches(str(key), list(wanted), n=1)
                words = f"Did you mean `{near[0]}`?" if near else f"Keys: {', '.join(wanted)}"
                yield (*place, key), f"there is no such key. {words}"
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield place, f"must be a list, not {value!r}"
            return
        for index, inner in enumerate(value):
            yield from _problems(inner, wanted[0], (*place, index))
    elif wanted is not object:
        kind = _NUMBER if wanted is float else wanted
        if not isinstance(value, kind) or isinstance(value, bool):
            yield place, f"must be {_WORDS[wanted]}, not {value!r}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield place, f"must be a finite number, not {value!r}"
