"""Compares a run with the numbers that a recipe expects, for `bdpo recipes check --run`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bdpo_plugin.output.run_folder import SCORES
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.run_numbers import QUANTILES, dump, expected_of, hardware_of, read_record
from bdpo_plugin.recipes.shareable import Finding
from bdpo_plugin.settings import RECIPE

_PLACES = [f"{share:.0%}".replace("%", " %") for share in QUANTILES]
_DIGEST = re.compile("[0-9a-f]{32}")
#: Two log-probabilities of a response are the same within this share and these nats.
_ROUNDING, _ROUNDING_NATS = 1e-3, 0.05


class Compared(NamedTuple):
    """One value of a run beside the one that its recipe expects.

    Attributes:
        key: its key in the recipe.
        what: what it is, in words.
        here: the value of the run.
        expected: the value of the recipe.
        tolerance: how far apart the two may be; None: they must be equal.
    """

    key: str
    what: str
    here: Any
    expected: Any
    tolerance: float | None = None

    @property
    def apart(self) -> float | None:
        """How far apart the two are, where there is a tolerance."""
        return None if self.tolerance is None else abs(self.here - self.expected)

    @property
    def same(self) -> bool:
        """Whether the two are the same, or near enough. NaN never is."""
        if self.tolerance is None:
            return bool(self.here == self.expected)
        return bool(abs(self.here - self.expected) <= self.tolerance)


def compared(recipe: Recipe, output: Path) -> list[Compared]:
    """Returns all that a recipe says of itself and what a run makes of it, in order.

    Args:
        recipe: a recipe with `expected` numbers.
        output: the output folder of the run, or of its first steps.
    """
    expected: dict[str, Any] = recipe.about["expected"]
    record = read_record(output)
    here = expected_of(output)
    tolerance = expected.get("tolerance", {})
    batch = {"processes": record["batch"]["processes"], "batch": record["batch"]["effective"]}
    rows = [Compared(k, k, v, recipe.about[k]) for k, v in batch.items() if k in recipe.about]
    rows.append(Compared("seed", "seed", here["seed"], expected.get("seed")))
    settings = expected.get("settings", {})
    for key in [*settings, *(key for key in here["settings"] if key not in settings)]:
        rows.append(Compared(key, key, here["settings"].get(key), settings.get(key)))
    words = {"pairs": "pairs", "chat_template": "chat template"}
    rows += [Compared(k, w, here.get(k), expected[k]) for k, w in words.items() if k in expected]
    if "null_prompt" in expected:
        there = str(expected["null_prompt"])  # the text itself, in recipes that include texts
        is_text = not _DIGEST.fullmatch(there)
        ours = record["null_prompt"]["text"] if is_text else here["null_prompt"]
        rows.append(Compared("null_prompt", "null prompt", ours, there))
    words = {"rows": "prompts and responses", "model_digest": "the model's weights"}
    rows += [Compared(k, w, here.get(k), expected[k]) for k, w in words.items() if k in expected]
    for side in ("chosen", "rejected"):
        key = f"mi_{side}"
        if key in expected:
            found = here.get(key, [float("nan")] * len(expected[key]))
            for place, ours, there in zip(_PLACES, found, expected[key], strict=True):
                what = f"MI of {side}, {place}"
                rows.append(Compared(key, what, ours, there, tolerance.get("mi", 0)))
    for step, loss in expected["losses"].items():
        ours = here["losses"].get(step, float("nan"))
        what = f"loss at step {step}"
        rows.append(Compared("losses", what, ours, loss, tolerance.get("loss", 0)))
    return rows


def compare(
    recipe: Recipe, output: Path, rows: Sequence[Compared] | None = None
) -> Iterator[Finding]:
    """Yields the differences between a run and what its recipe expects and records.

    Args:
        recipe: a recipe with `expected` numbers.
        output: the output folder of the run, or of its first steps.
        rows: the result of :func:`compared`, where it is known already.
    """
    recorded = (recipe.about.get("measured") or {}).get("hardware")
    hardware = hardware_of(output)
    if recorded is not None and hardware != recorded:
        what = f"{hardware} here, {recorded} there: the tolerances are for the same kind"
        yield Finding(False, f"`{RECIPE}.measured.hardware`", what)
    rows = compared(recipe, output) if rows is None else rows
    apart: dict[str, list[Compared]] = {}
    for row in rows:
        if not row.same:
            apart.setdefault(row.key, []).append(row)
    for key, differing in apart.items():
        if key == "model_digest":
            yield _other_model(recipe, "mi_chosen" in apart or "mi_rejected" in apart)
        elif differing[0].tolerance is not None:
            what = _not_near(differing)
            if key == "losses" and list(apart) == ["losses"]:
                what += ". All that is before the first step is the same, so the training differs: "
                what += "its learning rate, adapter, dropout or optimizer, a release, the hardware"
            yield Finding(True, f"`{key}`", what)
        elif key == "rows":
            yield Finding(True, "`rows`", _other_rows(recipe, output))
        else:
            here, there = dump(differing[0].here), dump(differing[0].expected)
            yield Finding(True, f"`{key}`", f"{here} here, {there} expected")


def _not_near(rows: list[Compared]) -> str:
    first, *more = rows
    what = f"{first.what}: {first.here} here, {first.expected} expected"
    if more:
        what += f"; also {', '.join(row.what for row in more)}"
    return f"{what}; the tolerance is {first.tolerance}"


def _other_model(recipe: Recipe, mi_differs: bool) -> Finding:
    where = f"`{recipe.key('model')}: {recipe.model}`"
    if mi_differs:
        what = "the model is another one: its weights are not those that the recipe was run with"
        return Finding(True, where, what)
    what = "not to the last bit the model of the recipe, but its mutual information is the same"
    return Finding(False, where, what)


def _other_rows(recipe: Recipe, output: Path) -> str:
    """Describes how many rows differ from those in the bundle, and the first one, if known."""
    theirs = recipe.path.with_name("scores.parquet")
    if not theirs.is_file():
        return (
            "prompts or responses are not the recipe's: the file, its order, the filtering, the "
            "tokenizer or the template differ. The bundle of the run would tell which rows "
            "(scores.parquet)"
        )
    import pyarrow.parquet as pq

    columns = ["row", "chosen_tokens", "rejected_tokens", "ref_chosen_logps", "ref_rejected_logps"]
    ours = pq.read_table(output / SCORES, columns=columns).to_pylist()
    others = pq.read_table(theirs, columns=columns).to_pylist()
    count = max(len(ours), len(others))
    lengths = [[_lengths(row) for row in table] for table in (ours, others)]
    other = [i for i, (a, b) in enumerate(zip(*lengths, strict=False)) if a != b]
    extra = abs(len(ours) - len(others))
    if not other and not extra:
        pairs = enumerate(zip(ours, others, strict=True))
        other = [i for i, (a, b) in pairs if not _near(a, b)]
        if not other:
            return "the responses are the same, so prompts or the order of words differ"
    if len(other) == len(ours) and not extra and lengths[0] == lengths[1]:
        return (
            f"all {count} rows have responses of the same length, but other log-probabilities: all "
            "prompts, the template or the model differ"
        )
    what = f"{len(other) + extra} of {count} rows are not the recipe's"
    if other:
        first = other[0]
        a, b = lengths[0][first], lengths[1][first]
        what += f"; the first that differs is row {ours[first]['row']}, place {first}: responses "
        what += f"of {a[0]} and {a[1]} tokens here, {b[0]} and {b[1]} there"
    return what


def _lengths(row: dict[str, Any]) -> tuple[int, int]:
    return row["chosen_tokens"], row["rejected_tokens"]


def _near(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        abs(a[name] - b[name]) <= _ROUNDING * abs(b[name]) + _ROUNDING_NATS
        for name in ("ref_chosen_logps", "ref_rejected_logps")
    )
