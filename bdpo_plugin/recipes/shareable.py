"""Whether a recipe may be shared: what can be said of its text alone, without a host."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bdpo_plugin.limits import missing_message
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.schema import problems
from bdpo_plugin.redact import (
    Place,
    is_secret_name,
    missing,
    place_words,
    private_in,
    reason,
)
from bdpo_plugin.settings import RECIPE, BDPOError, BDPOSettings

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
_FILE = re.compile(r"\.(?:jsonl?|csv|parquet|arrow|txt|gz)$")
#: The anchor and the tag before a value of YAML.
_PROPERTIES = re.compile(r"(?:[&!]\S*\s+)*")
#: What to do about each reason why a value must not leave.
_REMEDY = {
    "is a path of this machine": "write a relative one",
    "has a path of this machine": "write a relative one, or remove it",
}


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


def findings(recipe: Recipe, *, complete: bool = True) -> Iterator[Finding]:
    """All that can be said of a recipe by reading it.

    Args:
        recipe: of which also comments, and what YAML overwrites, are read.
        complete: whether all that another needs to run it must be in it; else what is not there is
            a warning.
    """
    lines = recipe.lines()

    def at(place: Place) -> str:
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), 1)
        return f"`{place_words(place)}`, line {line}"

    yield from private_findings(recipe.text)
    for place, is_text in missing(recipe.config):
        yield Finding(complete or not is_text, at(place), missing_message(is_text))
    for place, what in problems(recipe.about):
        yield Finding(True, at(place), what)
    try:
        BDPOSettings.from_keys(recipe.config)
    except BDPOError as error:
        yield Finding(True, "", str(error))
    yield from _elsewhere(recipe, at, complete)
    yield from _remote(recipe, at)
    yield from _batch(recipe, at)


def private_findings(text: str) -> Iterator[Finding]:
    """What must not leave the machine with the text of a YAML file: in its keys and values, be they
    overwritten or not, in its comments, and in the names of its anchors and tags."""
    text = text.removeprefix("\ufeff")
    rest = list(text)
    for place, node, secret in _scalars(yaml.compose(text), (), False):
        start, end = node.start_mark.index, node.end_mark.index
        start = _PROPERTIES.match(text, start).end()  # type: ignore[union-attr]  # may be empty
        if node.style in ("|", ">"):  # a comment may follow that sign
            start = max(start, text.find("\n", start))
        rest[start:end] = ["\n" if c == "\n" else " " for c in rest[start:end]]
        line = node.start_mark.line + 1
        if place is None:
            if (why := private_in(node.value)) is not None:
                yield Finding(True, f"line {line}", f"a key there {why}: take it out")
        elif not node.tag.endswith((":bool", ":null")):
            key = next((part for part in reversed(place) if isinstance(part, str)), "")
            if (why := reason(key, node.value, secret)) is not None:
                shown = f", {node.value}" if why.startswith("is a path") else ""
                remedy = _REMEDY.get(why, "take it out")
                where = f"`{place_words(place)}`, line {line}"
                yield Finding(True, where, f"{why}{shown}: {remedy}")
    for number, line in enumerate("".join(rest).split("\n"), 1):
        if (why := private_in(line)) is not None:
            yield Finding(True, f"line {number}", f"{why}: {_REMEDY.get(why, 'remove it')}")


def _scalars(
    node: Any, place: Place, secret: bool
) -> Iterator[tuple[Place | None, yaml.ScalarNode, bool]]:
    """The keys, whose place is None, and the values of a composed YAML; and whether a mapping or a
    list around a value has the name of a secret."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield None, key, False
                name = key.value
            else:
                yield from _scalars(key, (*place, "?"), secret)
                name = "?"
            nested = not isinstance(value, yaml.ScalarNode)
            below = secret or (nested and is_secret_name(name))
            yield from _scalars(value, (*place, name), below)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _scalars(value, (*place, index), secret)
    elif node is not None:
        yield place, node, secret


def is_pinned(revision: object) -> bool:
    """Whether a revision is a commit, which nobody can move."""
    return isinstance(revision, str) and bool(_COMMIT.fullmatch(revision))


def is_local(name: str) -> bool:
    """Whether the name of a model or of a dataset is a path, and not the hub's."""
    return not _HUB.fullmatch(name) or bool(_FILE.search(name)) or Path(name).exists()


def revision(recipe: Recipe) -> Any:
    """The revision of the model that a recipe names, if it names one."""
    return recipe.config.get(recipe.key("revision")) or recipe.config.get("model_revision")


def local_data(recipe: Recipe) -> list[str]:
    """The data on this machine that a recipe names, as paths; of LLaMA-Factory those that its
    dataset_info.json has not from a hub."""
    config = recipe.config
    if recipe.host == "axolotl":
        places = (config.get("datasets"), config.get("test_datasets"))
        entries = [entry for place in places if isinstance(place, list) for entry in place]
        paths = [str(entry.get("path")) for entry in entries if isinstance(entry, dict)]
        return [path for path in paths if is_local(path) and "://" not in path]
    folder = Path(str(config.get("dataset_dir", "data")))
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = {}
    named = ",".join(str(config.get(key) or "") for key in ("dataset", "eval_dataset"))
    names = [name.strip() for name in named.split(",") if name.strip()]
    entries = [(name, info[name] if isinstance(info.get(name), dict) else {}) for name in names]
    return [
        (folder / str(entry.get("file_name", name))).as_posix()
        for name, entry in entries
        if not {"hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name"} & set(entry)
    ]


def _elsewhere(recipe: Recipe, at: Callable[[Place], str], complete: bool) -> Iterator[Finding]:
    """Whether others can come by the model and the data."""
    about = recipe.about.get("data")
    if isinstance(about, dict) and (about.get("command") or about.get("source")):
        return
    data = local_data(recipe)
    beside = [(recipe.path.parent / Path(path).name).is_file() for path in data]
    if (recipe.path.parent / "run.json").is_file() and all(beside):  # in the bundle
        data = []
    say = f"say in `{RECIPE}.data` by which `command` others make it, or its `source` on the hub"
    model = (recipe.key("model"),)
    if data and is_local(recipe.model):
        what = f"nobody else has {recipe.model} and {data[0]}: {say}"
        yield Finding(complete, at(model), what)
    elif data:
        yield Finding(False, f"`{RECIPE}`", f"nobody else has {data[0]}: {say}")
    elif is_local(recipe.model):
        yield Finding(False, at(model), f"nobody else has {recipe.model}: {say}")


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
            path = str(entry.get("path")) if isinstance(entry, dict) else "."
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
