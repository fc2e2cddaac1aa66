"""Compares a run with the numbers that a recipe expects, for `bdpo recipes check --run`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdpo_plugin.output.run_folder import SCORES
from bdpo_plugin.recipes.measured import dump, expected_of, read_record
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.shareable import Finding
from bdpo_plugin.redact import digest_of
from bdpo_plugin.settings import RECIPE


def compare(recipe: Recipe, output: Path) -> Iterator[Finding]:
    """Yields the differences between a run and what its recipe expects and records.

    Args:
        recipe: a recipe with `expected` numbers.
        output: the output folder of the run, or of its first steps.
    """
    expected: dict[str, Any] = recipe.about["expected"]
    record = read_record(output)
    here = expected_of(output)
    tolerance = expected.get("tolerance", {})
    for key, processes in (("processes", "processes"), ("batch", "effective")):
        if key in recipe.about and recipe.about[key] != record["batch"][processes]:
            yield _differs(key, record["batch"][processes], recipe.about[key])
    recorded = (recipe.about.get("measured") or {}).get("hardware")
    hardware = f"{record['batch']['processes']} x {record['hardware']}"
    if recorded is not None and hardware != recorded:
        what = f"{hardware} here, {recorded} there: the tolerances are for the same kind"
        yield Finding(False, f"`{RECIPE}.measured.hardware`", what)
    if expected.get("seed") != here["seed"]:
        yield _differs("seed", here["seed"], expected.get("seed"))
    settings = expected.get("settings", {})
    for key in sorted({*settings, *here["settings"]}):
        if settings.get(key) != here["settings"].get(key):
            yield _differs(key, here["settings"].get(key), settings.get(key))
    for key in ("pairs", "chat_template"):
        if key in expected and expected[key] != here.get(key):
            yield _differs(key, here.get(key), expected[key])
    if "null_prompt" in expected:
        there = str(expected["null_prompt"])  # the text itself, in recipes that include texts
        digest = there if re.fullmatch("[0-9a-f]{32}", there) else digest_of(there)
        if digest != here["null_prompt"]:
            text = record["null_prompt"]["text"]
            shown = (here["null_prompt"], digest) if there == digest else (text, there)
            yield _differs("null_prompt", *shown)
    if "rows" in expected and expected["rows"] != here.get("rows"):
        yield _differs(
            "rows", here.get("rows"), expected["rows"], _row_that_differs(recipe, output)
        )
    for key in ("mi_chosen", "mi_rejected"):
        if key in expected:
            yield from _near(key, here.get(key, []), expected[key], tolerance.get("mi", 0))
    losses = expected["losses"]
    found = [here["losses"].get(step, float("nan")) for step in losses]
    yield from _near("losses", found, list(losses.values()), tolerance.get("loss", 0), list(losses))


def nearness(recipe: Recipe, output: Path) -> str:
    """Describes how near the numbers of a run are to the expected ones, within the tolerances."""
    expected = recipe.about["expected"]
    here, tolerance = expected_of(output), expected.get("tolerance", {})
    parts = [f"{here['pairs']} pairs"]
    sides = [key for key in ("mi_chosen", "mi_rejected") if key in expected]
    if sides:
        pairs = [pair for key in sides for pair in zip(here[key], expected[key], strict=True)]
        parts.append(f"MI within {_furthest(pairs)} (tolerance {tolerance.get('mi')})")
    losses = [(here["losses"][step], loss) for step, loss in expected["losses"].items()]
    parts.append(
        f"loss of {len(losses)} steps within {_furthest(losses)} "
        f"(tolerance {tolerance.get('loss')})"
    )
    return ", ".join(parts)


def _furthest(pairs: list[tuple[float, float]]) -> str:
    return f"{max(abs(a - b) for a, b in pairs):.2g}"


def _differs(key: str, here: Any, there: Any, more: str = "") -> Finding:
    return Finding(True, f"`{key}`", f"{dump(here)} here, {dump(there)} expected{more}")


def _near(
    key: str,
    here: list[float],
    there: list[float],
    tolerance: float,
    steps: list[int] | None = None,
) -> Iterator[Finding]:
    if len(here) != len(there):
        yield _differs(key, here, there)
        return
    apart = [not abs(a - b) <= tolerance for a, b in zip(here, there, strict=True)]  # true for nan
    if any(apart):
        places: list[Any] = list(steps) if steps else ["5 %", "50 %", "95 %"]
        told = [
            f"{a} here, {b} expected at {'step ' if steps else ''}{place}"
            for place, a, b, bad in zip(places, here, there, apart, strict=True)
            if bad
        ]
        yield Finding(True, f"`{key}`", f"{'; '.join(told)}; the tolerance is {tolerance}")


def _row_that_differs(recipe: Recipe, output: Path) -> str:
    """Describes the first row whose scores differ from those in the bundle, if there is one."""
    theirs = recipe.path.with_name("scores.parquet")
    if not theirs.is_file():
        return ""
    import pyarrow.parquet as pq

    columns = ["row", "chosen_tokens", "rejected_tokens", "ref_chosen_logps", "ref_rejected_logps"]
    ours = pq.read_table(output / SCORES, columns=columns).to_pylist()
    others = pq.read_table(theirs, columns=columns).to_pylist()
    for place, (a, b) in enumerate(zip(ours, others, strict=False)):
        tokens = [(row["chosen_tokens"], row["rejected_tokens"]) for row in (a, b)]
        near = all(abs(a[name] - b[name]) <= 1e-3 * abs(b[name]) + 0.05 for name in columns[3:])
        if tokens[0] != tokens[1] or not near:
            return (
                f"; the first that differs is row {a['row']}, place {place}: responses of "
                f"{tokens[0]} tokens here, {tokens[1]} there"
            )
    return "; the responses are the same, so that a prompt or the order of words differs"
