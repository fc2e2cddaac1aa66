"""Redaction of secrets and personal details before a configuration, model card or recipe is shared.

The search works on parsed values, never on lines of a file, so that quoting, comments and block
scalars hide nothing. A value is redacted because of the name of its key, or because of its text:
see private_text.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date
from os import PathLike, fspath
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import yaml

from bdpo_plugin.private_text import (
    NO_VALUES,
    is_secret_name,
    private_in,
    secret_in,
)

#: The text that replaces a redacted value.
REDACTED = "(left out)"
_TEXT = "(text left out, digest {})"
_TEXT_LEFT_OUT = re.compile(r"\(text left out, digest ([0-9a-f]{32})\)")

#: The path of a value in a configuration: keys of mappings and positions in lists, outermost first.
Place = tuple[str | int, ...]

#: Deeper than any real configuration. A YAML alias can make a mapping that contains itself.
_MAX_DEPTH = 40


class Change(NamedTuple):
    """One change that :func:`redacted` made.

    Attributes:
        place: the path of the value, or of the enclosing mapping where a key itself was removed.
        why: the reason, worded to continue a sentence that begins with the name of the key.
        became: the text that replaces the value.
    """

    place: Place
    why: str
    became: str


def redacted(value: Any) -> tuple[Any, list[Change]]:
    """Returns a configuration that is safe to share: plain mappings, lists and scalars, in order.

    An absolute path of this machine becomes a relative one: relative to the current folder if it
    lies below it, else its last component. Everything else that must not be shared becomes
    :data:`REDACTED`.

    Returns:
        The new structure and the list of changes.
    """
    changes: list[Change] = []
    return _Redaction(changes).of(value, (), False), changes


class _Redaction:
    def __init__(self, changes: list[Change]) -> None:
        self._changes = changes
        self._moved: dict[str, str] = {}

    def of(self, value: Any, place: Place, secret: bool) -> Any:
        if len(place) > _MAX_DEPTH:
            return self._left_out(place, "is nested deeper than configurations are")
        if isinstance(value, Mapping):
            return dict(self._entries(value, place, secret))
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.of(inner, (*place, n), secret) for n, inner in enumerate(value)]
        if isinstance(value, PathLike):
            value = fspath(value)
        if isinstance(value, str):
            name = _name(place)
            moved = value if _is_prose(name) else self._relative(value)
            if (why := reason(name, moved, secret)) is not None:
                return self._left_out(place, why)
            if moved != value:
                self._changes.append(Change(place, "is a path of this machine", moved))
            return moved
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float, date)):
            if (why := reason(_name(place), value, secret)) is not None:
                return self._left_out(place, why)
            return value
        return self._left_out(place, f"is a {type(value).__name__}, which YAML cannot say")

    def _entries(
        self, value: Mapping[Any, Any], place: Place, secret: bool
    ) -> Iterator[tuple[Any, Any]]:
        for key, inner in value.items():
            name = key if isinstance(key, (str, int)) else str(key)
            if (why := private_in(str(name))) is not None:
                self._changes.append(Change(place, f"has a key that {why}", "nothing"))
                continue
            below = secret or is_secret_name(str(name))
            if isinstance(inner, (Mapping, list, tuple, set, frozenset)):
                yield name, self.of(inner, (*place, name), below)
            else:
                yield name, self.of(inner, (*place, name), secret)

    def _relative(self, value: str) -> str:
        """Makes a path of this machine relative, or each of several paths separated by commas.

        Any other text is returned unchanged. Two different paths never become the same one."""
        parts = [part.strip() for part in value.split(",")]
        if "\n" in value or not all(map(_is_machine_path, parts)):
            return value
        return ",".join(map(self._apart, parts))

    def _apart(self, path: str) -> str:
        name = first = _relative(path)
        number = 1
        while self._moved.setdefault(name, path) != path:
            number += 1
            stem, dot, ending = first.rpartition(".")
            name = f"{stem}-{number}.{ending}" if dot else f"{first}-{number}"
        return f"./{name}" if name else "."

    def _left_out(self, place: Place, why: str) -> str:
        self._changes.append(Change(place, why, REDACTED))
        return REDACTED


_WHOLE_PATH = re.compile(
    r"(?:file:|~[\w.-]*(?:[/\\]|$)(?!$)|~$|//?(?=\w)|/$|[A-Za-z]:[\\/](?![\\/])|\\\\(?=\w))"
    r"(?!.*[{<|]).*"
)


def _is_machine_path(value: str) -> bool:
    """Whether the whole text is a path that only this machine has."""
    return bool(_WHOLE_PATH.match(value)) and "\n" not in value


def _relative(value: str) -> str:
    """Returns a path relative to the current folder, or its last component if it lies elsewhere.

    The result is empty for the current folder itself and for a root."""
    value = re.sub(r"^file:(?://)?", "", value)
    if "\\" in value or re.match("[A-Za-z]:", value):
        return PureWindowsPath(value).name
    path = Path(value)
    with suppress(RuntimeError):  # there is no such user here
        path = path.expanduser()
    here = Path.cwd()
    if not path.is_relative_to(here):
        return path.name
    return "" if path == here else path.relative_to(here).as_posix()


def _name(place: Place) -> str:
    """Returns the key of a value. An element of a list has the key of the list."""
    return next((part for part in reversed(place) if isinstance(part, str)), "")


# The texts of a configuration ------------------------------------------------------------------

#: Keys whose values are prompts and templates.
_TEXT_KEY = re.compile(
    r"bdpo_null_prompt|chat_template_jinja|default_system(?:_message)?|"
    r"system_(?:prompt|message|format)"
)
_TEMPLATE = re.compile(r"\{[{%]|\n")


def digest_of(text: str) -> str:
    """Returns the digest of a text: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def text_left_out(text: str) -> str:
    """Returns the placeholder with the digest that replaces a redacted text."""
    return text if _TEXT_LEFT_OUT.fullmatch(text) else _TEXT.format(digest_of(text))


def without_texts(value: Any, key: str = "") -> Any:
    """Returns a configuration in which digests replace all prompts and templates."""
    if isinstance(value, dict):
        return {name: without_texts(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_texts(inner, key) for inner in value]
    if not isinstance(value, str) or value == REDACTED:
        return value
    file = key == "chat_template_jinja" and value.endswith((".jinja", ".jinja2"))
    named = _TEXT_KEY.fullmatch(key) and not file
    return text_left_out(value) if named or _TEMPLATE.search(value) else value


def missing(value: Any, place: Place = ()) -> Iterator[tuple[Place, bool]]:
    """Yields the path of each redacted value, and whether that value is a text with a digest."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from missing(inner, (*place, key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from missing(inner, (*place, number))
    elif isinstance(value, str) and (value == REDACTED or _TEXT_LEFT_OUT.fullmatch(value)):
        yield place, value != REDACTED


def place_words(place: Place) -> str:
    """Formats the path of a value for a message: ``datasets[0].path``."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return key.removeprefix(".")


def configuration_text(configuration: Mapping[str, Any], *, texts: bool = True) -> str:
    """Returns the YAML of a redacted configuration, with its keys in order and without comments.

    Args:
        configuration: a host's configuration.
        texts: whether to keep its prompts and templates. If not, their digests replace them.
    """
    shown, _ = redacted(configuration)
    if not texts:
        shown = without_texts(shown)
    text: str = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=96)
    return text


# Values ----------------------------------------------------------------------------------------

_NO_TEXT = {*NO_VALUES, REDACTED}
#: Shell variables that are not secrets although their names match the pattern for passwords.
_FOLDERS = ("PWD", "OLDPWD")


def is_secret(key: str, value: object) -> bool:
    """Whether an entry of a configuration, or an environment variable, contains a token, a key or a
    password."""
    if not isinstance(value, str) or value.strip().lower() in _NO_TEXT or key in _FOLDERS:
        return False
    if _DIGEST_KEY.search(key) and _DIGEST.fullmatch(value):
        return False
    return is_secret_name(key) or secret_in(value) is not None


#: Keys whose values are commits or digests of this package, which look like keys of W&B.
_DIGEST_KEY = re.compile(
    r"(?:^|_)(?:revision|revision_of_model|commit|sha256|digest)$|^(?:rows|chat_template|"
    r"null_prompt)$"
)
_DIGEST = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}")


def reason(key: str, value: object, secret: bool = False) -> str | None:
    """Returns why a value must not be shared, or None if it may be.

    The reason is worded to continue a sentence that begins with the name of the key.

    Args:
        key: the key of the value.
        value: a scalar.
        secret: whether an enclosing mapping or list has the name of a secret.
    """
    if value is None or isinstance(value, bool):
        return None
    text = str(value)
    if text.strip().lower() in _NO_TEXT or _TEXT_LEFT_OUT.fullmatch(text):
        return None
    if secret or is_secret_name(key):
        return "has the name of a secret"
    if not isinstance(value, str):
        return None
    if key == "bdpo_control" or (_DIGEST_KEY.search(key) and _DIGEST.fullmatch(text)):
        return None
    if not _is_prose(key) and _is_machine_path(text):
        return "is a path of this machine"
    return private_in(text)


def _is_prose(key: str) -> bool:
    """Whether values of a key are prose, which may begin like a path (``/no_think``)."""
    return key != "chat_template_jinja" and bool(_TEXT_KEY.fullmatch(key))
