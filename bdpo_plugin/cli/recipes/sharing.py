"""Whether a recipe may be shared: what can be said of its text alone, without a host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bdpo_plugin.cli.recipes.about import problems
from bdpo_plugin.cli.recipes.files import Place, Recipe
from bdpo_plugin.settings import RECIPE, BDPOError, BDPOSettings
from bdpo_plugin.shareable import is_secret, without_secrets

_ABSOLUTE = re.compile(r"(?:~|/|[A-Za-z]:[\\/]|\\\\|file:)\S*")
_HOMES = re.compile(r"(?:/home|/root|/Users|[A-Za-z]:\\Users)[/\\]\w+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
_FILE = re.compile(r"\.(?:jsonl?|csv|parquet|arrow|txt|gz)$")


class Finding(NamedTuple):
    """Something to say of a recipe.

    Attributes:
        wrong: whether it keeps the recipe from being shared or from being the same; else it is a
            warning.
        where: the key and the line, or an empty text.
        what: in words.
    """

    wrong: bool
    where: str
    what: str


def findings(recipe: Recipe) -> Iterator[Finding]:
    """All that can be said of a recipe by reading it."""
    lines = recipe.lines()

    def at(place: Place) -> str:
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), 1)
        return f"`{key.lstrip('.')}`, line {line}"

    told = set()
    for place, key, value in _entries({**recipe.config, RECIPE: recipe.about}, ()):
        if is_secret(key, value):
            told.add(lines.get(place))
            yield Finding(True, at(place), "looks like a token or a key of yours: take it out")
        elif isinstance(value, str) and (_ABSOLUTE.fullmatch(value) or _HOMES.search(value)):
            told.add(lines.get(place))
            yield Finding(
                True, at(place), f"is a path of this machine, {value}: write a relative one"
            )
    for number, line in enumerate(recipe.text.split("\n"), 1):
        if number in told:
            continue
        if without_secrets(line) != line:
            yield Finding(True, f"line {number}", "has what looks like a token or a key: remove it")
        if found := _HOMES.search(line.partition("#")[2]):
            yield Finding(True, f"line {number}", f"names a folder of this machine, {found[0]}")
    for place, what in problems(recipe.about):
        yield Finding(True, at(place), what)
    try:
        BDPOSettings.from_keys(recipe.config)
    except BDPOError as error:
        yield Finding(True, "", str(error))
    yield from _remote(recipe, at)
    yield from _batch(recipe, at)


def is_pinned(revision: object) -> bool:
    """Whether a revision is a commit, which nobody can move."""
    return isinstance(revision, str) and bool(_COMMIT.fullmatch(revision))


def is_local(name: str) -> bool:
    """Whether the name of a model or of a dataset is a path, and not the hub's."""
    return not _HUB.fullmatch(name) or bool(_FILE.search(name)) or Path(name).exists()


def revision(recipe: Recipe) -> Any:
    """The revision of the model that a recipe names, if it names one."""
    return recipe.config.get(recipe.key("revision")) or recipe.config.get("model_revision")


def _entries(value: Any, place: Place) -> Iterator[tuple[Place, str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _entries(inner, (*place, index))
    else:
        names = [part for part in place if isinstance(part, str)]
        yield place, names[-1] if names else "", value


def _remote(recipe: Recipe, at: Any) -> Iterator[Finding]:
    config = recipe.config
    model = (recipe.key("model"),)
    if not is_local(recipe.model) and not is_pinned(revision(recipe)):
        if config.get("trust_remote_code"):
            yield Finding(
                True,
                at(("trust_remote_code",)),
                f"runs code of {recipe.model} that may change: set "
                f"`{recipe.key('revision')}` to a commit (`bdpo recipes pin`)",
            )
        else:
            yield Finding(
                False,
                at(model),
                f"{recipe.model} has no pinned revision: `bdpo recipes pin` sets "
                f"`{recipe.key('revision')}`",
            )
    for place in ("datasets", "test_datasets"):
        entries = config.get(place)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            path = str(entry.get("path"))
            if is_local(path) or is_pinned(entry.get("revision")):
                continue
            if entry.get("trust_remote_code") or config.get("trust_remote_code"):
                what = f"runs code of {path} that may change: set its `revision` to a commit"
                yield Finding(True, at((place, index, "path")), what)
            else:
                yield Finding(False, at((place, index, "path")), f"{path} has no pinned revision")
    data = recipe.about.get("data")
    if isinstance(data, dict) and "source" in data and not is_pinned(data.get("revision")):
        what = f"{data['source']} has no pinned `revision`: `bdpo recipes pin` sets it"
        yield Finding(False, at((RECIPE, "data")), what)
    kernel = str(config.get("attn_implementation", ""))
    if "/" in kernel and not is_pinned(kernel.partition("@")[2].partition(":")[0]):
        what = f"{kernel} is code of the hub that may change: write ORGANISATION/NAME@COMMIT"
        yield Finding(True, at(("attn_implementation",)), what)


def _batch(recipe: Recipe, at: Any) -> Iterator[Finding]:
    processes, batch = recipe.about.get("processes"), recipe.about.get("batch")
    place = (recipe.key("batch"),)
    if not isinstance(processes, int) or not isinstance(batch, int):
        what = (
            f"{recipe.batch} pairs a step for each process: with another number of GPUs this is "
            f"another recipe. Say `processes` and `batch` in `{RECIPE}`"
        )
        yield Finding(False, at(place), what)
    elif recipe.batch * processes != batch:
        what = f"{recipe.batch} pairs x {processes} processes are not the `batch` of {batch}"
        yield Finding(True, at(place), what)
    elif processes > 1:
        what = f"the batch of {batch} needs {processes} GPUs: with another number it is another one"
        yield Finding(False, at(place), what)
