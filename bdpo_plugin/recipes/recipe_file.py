"""Finds and reads recipe files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import indent
from typing import Any

import click
import yaml

import bdpo_plugin
from bdpo_plugin.recipes.host_config import HOSTS, MODEL_KEYS, MODEL_KEYS_SHOWN, hosts_of
from bdpo_plugin.redact import Place
from bdpo_plugin.settings import RECIPE

#: The lines of the mapping `bdpo_recipe`, and the comment above it.
_BLOCK = re.compile(
    rf"\n*(?:^#[^\n]*\n)?^{RECIPE}:[^\n]*\n(?:(?:[ \t#][^\n]*)?\n)*(?:[ \t][^\n]*\Z)?", re.MULTILINE
)
#: More values than any real configuration has. YAML aliases can expand to any number of values.
_MAX_VALUES, _MAX_DEPTH = 20_000, 40
_COMMENT = "# What this file is, for `bdpo recipes`; no run reads it."


@dataclass(frozen=True)
class Recipe:
    """A recipe: the YAML file of a host and its description.

    Attributes:
        name: its name in the list of recipes, or the file as the user named it.
        path: the path of the file.
        text: the text of the file.
        config: the part that the host reads.
        about: the mapping `bdpo_recipe`. It may contain anything until it is checked.
    """

    name: str
    path: Path
    text: str
    config: dict[str, Any]
    about: dict[str, Any]

    @cached_property
    def host(self) -> str:
        """``axolotl``, ``llamafactory`` or ``trl``."""
        return hosts_of(self.config)[-1]

    def key(self, meaning: str) -> str:
        """Returns the host's key for ``model``, ``revision`` or ``batch`` (pairs per process)."""
        return str(getattr(HOSTS[self.host], meaning))

    @property
    def model(self) -> str:
        """The name or the path of the model."""
        return str(self.config.get(self.key("model")))

    @property
    def method(self) -> str:
        """The training method: ``full``, ``lora``, ``qlora``, or another name of the host."""
        if self.host == "axolotl":
            return str(self.config.get("adapter") or "full")
        if self.host == "trl":
            lora = "qlora" if self.config.get("load_in_4bit") else "lora"
            return lora if self.config.get("use_peft") else "full"
        kind = str(self.config.get("finetuning_type", "lora"))
        return "qlora" if kind == "lora" and self.config.get("quantization_bit") else kind

    @property
    def batch(self) -> int:
        """Pairs per optimizer step of one process."""
        one = self.config.get(self.key("batch"), 1)
        return int(one) * int(self.config.get("gradient_accumulation_steps", 1))

    def lines(self) -> dict[Place, int]:
        """Returns the line number of each key and list entry, counted from 1."""
        return dict(_lines(yaml.compose(self.text), ()))

    def with_about(self, about: dict[str, Any]) -> str:
        """Returns the text with another mapping `bdpo_recipe`."""
        rest = _BLOCK.sub("\n", f"{self.text.rstrip()}\n").rstrip()
        block = yaml.safe_dump({RECIPE: about}, sort_keys=False, allow_unicode=True, width=96)
        return f"{rest}\n\n{_COMMENT}\n{block}"

    def with_verified(self, entry: dict[str, str]) -> str:
        """Returns the text with one more entry of `verified`, and all else, comments too, as it is.

        A mapping `bdpo_recipe` in braces is written anew."""
        about = {**self.about, "verified": [entry, *self.about.get("verified", [])]}
        node = _below(yaml.compose(self.text), RECIPE)
        verified, expected = _below(node, "verified"), _below(node, "expected", key=True)
        item = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
        if verified is not None:
            mark = verified.start_mark
        else:
            mark, item = expected.start_mark, f"verified:\n{indent(item, '  ')}"
        lines = self.text.splitlines(keepends=True)
        text = "".join([*lines[: mark.line], indent(item, " " * mark.column), *lines[mark.line :]])
        with suppress(yaml.YAMLError):
            if yaml.safe_load(text)[RECIPE] == about:
                return text
        return self.with_about(about)


def _below(node: Any, name: str, *, key: bool = False) -> Any:
    """Returns the node of a value of a mapping, or of its key; None if the mapping has no such."""
    found = (pair for pair in getattr(node, "value", ()) if pair[0].value == name)
    pair = next(found, None)
    return pair and pair[0 if key else 1]


def _lines(node: Any, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*place, index)
            yield here, value.start_mark.line + 1
            yield from _lines(value, here)


def _size(value: Any, depth: int = 0) -> int:
    """Counts the values in a structure. Stops when they are too many or nested too deep."""
    if depth > _MAX_DEPTH:
        return _MAX_VALUES + 1
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    size = 1
    for each in inner:
        size += _size(each, depth + 1)
        if size > _MAX_VALUES:
            break
    return size


def recipe_root() -> Path:
    """Returns the folder of the recipes: in the installed wheel, or beside the package in a clone.

    Raises:
        click.ClickException: there is no such folder.
    """
    package = Path(bdpo_plugin.__file__).parent
    places = (package / "example_configs", package.parent / "example_configs")
    for place in places:
        if place.is_dir():
            return place
    raise click.ClickException(
        f"no example configurations in {places[0]} or {places[1]}: install bdpo-plugin again"
    )


def recipe_files(root: Path) -> dict[str, Path]:
    """Returns all recipes and files for sweeps, by name, sorted by name."""
    paths = sorted(root.rglob("*.yml"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}


def is_sweep(name: str) -> bool:
    """Whether a file is no recipe but a file for `axolotl train --sweep`."""
    return name.startswith("sweeps/")


def find_file(name: str) -> Path:
    """Finds the recipe of the package called `name`, with or without its folder and ``.yml``.

    Raises:
        click.ClickException: no recipe, or more than one, has that name.
    """
    every = recipe_files(recipe_root())
    wanted = name.removesuffix(".yml")
    found = {short: path for short, path in every.items() if wanted in (short, path.stem)}
    if len(found) == 1:
        return found.popitem()[1]
    names = ", ".join(found or every)
    problem = "several recipes are" if found else "no recipe is"
    raise click.ClickException(f"{problem} called {name!r}; choose one of: {names}")


def find_recipe(name: str) -> Recipe:
    """Reads the recipe in a file or in the folder of a bundle, or the package's own of that name.

    Raises:
        click.ClickException: there is no such recipe, or it cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        path /= "recipe.yml"
        if not path.is_file():
            raise click.ClickException(f"{name} is a folder without a recipe.yml, so no bundle")
    if path.is_file():
        return read_recipe(path, name)
    if path.suffix in (".yml", ".yaml") and path.parent != Path():
        raise click.ClickException(f"there is no file {name}")
    return read_recipe(find_file(name), name)


def read_recipe(path: Path, name: str) -> Recipe:
    """Reads a recipe from a file.

    Raises:
        click.ClickException: the file is not a host's configuration in YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict) or not MODEL_KEYS & config.keys():
        raise click.ClickException(f"{path} is no recipe: it has neither {MODEL_KEYS_SHOWN}")
    if _size(config) > _MAX_VALUES:
        raise click.ClickException(f"{path} is no recipe: it is longer, or nested deeper, than one")
    about = config.pop(RECIPE, None)
    if about is not None and not isinstance(about, dict):
        raise click.ClickException(f"{path}: `{RECIPE}` must be a mapping, not {about!r}")
    return Recipe(name, path, text, config, about or {})
