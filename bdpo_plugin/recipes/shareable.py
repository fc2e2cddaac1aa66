"""Checks from the text of a recipe alone, without its host, whether it can be shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bdpo_plugin.limits import missing_message
from bdpo_plugin.output.card_facts import READERS, data_sets, is_local
from bdpo_plugin.private_text import is_secret_name, private_in
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.schema import problems
from bdpo_plugin.redact import (
    Place,
    missing,
    place_words,
    reason,
)
from bdpo_plugin.settings import RECIPE, BDPOError, BDPOSettings

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Keys of hosts, beside that of the model, whose values may be models of the user's own.
_MODELS = ("lora_model_dir", "adapter_name_or_path", "ref_model", "ref_model_adapters")
#: The anchor and the tag before a YAML value.
_PROPERTIES = re.compile(r"(?:[&!]\S*\s+)*")
#: Reason why a value must not be shared -> what the user should do about it.
_REMEDY = {
    "is a path of this machine": "write a relative one",
    "has a path of this machine": "write a relative one, or remove it",
}


class Finding(NamedTuple):
    """An error or a warning about a recipe.

    Attributes:
        wrong: True for an error: the recipe cannot be shared, or a run differs from it. False for a
            warning.
        where: the key and the line, or an empty text.
        what: the message.
    """

    wrong: bool
    where: str
    what: str


def findings(recipe: Recipe, *, complete: bool = True) -> Iterator[Finding]:
    """Yields all findings about the text of a recipe.

    Args:
        recipe: the recipe. Its comments are checked too, and values that later ones overwrite.
        complete: whether the recipe must contain everything that others need to run it. If not,
            missing parts are warnings.
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
    """Yields what must not be shared in the text of a YAML file.

    Checks keys and values, overwritten ones too, comments, and the names of anchors and tags."""
    text = text.removeprefix("\ufeff")
    rest = list(text)
    for place, node, secret in _scalars(yaml.compose(text), (), False):
        start, end = node.start_mark.index, node.end_mark.index
        start = _PROPERTIES.match(text, start).end()  # type: ignore[union-attr]  # may be empty
        if node.style in ("|", ">"):  # a comment may follow this character in the same line
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
    """Yields the scalars of a composed YAML: (path, node, secret).

    The path is None for a key. `secret` says whether an enclosing mapping or list has the name of a
    secret."""
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
    """Whether a revision is a commit, which cannot change, unlike a branch or a tag."""
    return isinstance(revision, str) and bool(_COMMIT.fullmatch(revision))


def revision(recipe: Recipe) -> Any:
    """Returns the model's revision in a recipe, if it names one."""
    return recipe.config.get(recipe.key("revision")) or recipe.config.get("model_revision")


def local_data(recipe: Recipe) -> list[str]:
    """Returns the paths of the local data of a recipe.

    For LLaMA-Factory, these are the datasets that dataset_info.json does not load from a hub."""
    return [each.name for each in data_sets(recipe.config) if not each.on_hub]


def _elsewhere(recipe: Recipe, at: Callable[[Place], str], complete: bool) -> Iterator[Finding]:
    """Yields a finding about a model or data that others cannot obtain."""
    about = recipe.about.get("data")
    about = about if isinstance(about, dict) else {}
    source = about.get("source")
    if source and is_local(str(source)):
        yield Finding(True, at((RECIPE, "data", "source")), f"nobody else has {source}")
    if about.get("command") or source:
        return
    keys = [key for key in (recipe.key("model"), *_MODELS) if recipe.config.get(key)]
    models = [key for key in keys if is_local(str(recipe.config[key]))]
    data = local_data(recipe)
    beside = [(recipe.path.parent / Path(path).name).is_file() for path in data]
    if (recipe.path.parent / "run.json").is_file() and all(beside):  # the bundle contains the data
        data = []
    if models or data:
        names = " and ".join([*(str(recipe.config[key]) for key in models), *data[:1]])
        what = (
            f"nobody else has {names}: say in `{RECIPE}.data` by which `command` others make it, "
            "or its `source` on the hub"
        )
        yield Finding(complete, at((models[0],)) if models else f"`{RECIPE}`", what)


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
            if path in READERS or is_local(path) or is_pinned(entry.get("revision")):
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
