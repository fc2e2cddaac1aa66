"""Redaction of secrets and personal details before a configuration, model card or recipe is shared.

The search works on parsed values, never on lines of a file, so that quoting, comments and block
scalars hide nothing. A value is redacted because of the name of its key, because a detector of
detect-secrets matches, because one of the rules below matches, or because a string in it looks
random. detect-secrets is the best maintained library of its kind on the Python index (gitleaks and
trufflehog are programs, and presidio looks for names of persons). The rules below cover what it
leaves to others (addresses, hosts, paths, signed URLs) or matches too narrowly (tokens of this
field). No finding is verified, as that would need a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from functools import cache, lru_cache
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml

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
        if "\n" in value or not all(map(is_machine_path, parts)):
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


def is_machine_path(value: str) -> bool:
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


# Names of secrets ------------------------------------------------------------------------------

_SECRET_WORDS = re.compile(
    r"passwords?|passwd|passphrase|passcode|pwd|secrets?|credentials?|creds|auth|authorization|"
    r"authentication|oauth|bearer|cookies?|webhooks?|dsn|jwt|apikeys?|sas|totp|otp|htpasswd|netrc|"
    r"kubeconfig"
)
#: Parts of names that are written without separators, such as ``wandbapikey``.
_SECRET_PARTS = re.compile(
    r"passw(?:or)?d|passphrase|secret|credential|webhook|authorization|"
    r"(?:api|access|private|auth|account|shared|license|licence|encryption|signing|ssh|master|"
    r"session|refresh|hub|hf|bot|bearer|csrf|github|gitlab|slack)_?(?:key|token)s?(?:$|_)|"
    r"conn(?:ection)?_?str(?:ing)?"
)
#: Words before ``_token`` or ``_key`` that show that the name is not a secret's: it names a token
#: of the vocabulary or a key of a mapping.
_NO_SECRET = re.compile(
    r"bos|eos|pad|unk|mask|sep|cls|eot|eom|boi|eoi|image|video|audio|vision|start|end|begin|stop|"
    r"think|thinking|tool|decoder|special|additional|reserved|prefix|suffix|middle|per|new|prompt|"
    r"response|experiment|sort|text|chosen|rejected|label|content|role|message|column|field|length|"
    r"group|dataset|primary|foreign|dict"
)
_LAST_WORDS = ("token", "key", "pass", "signature", "sig", "pat")
#: Query parameters with which a URL is signed.
_SIGNING = re.compile(
    r"x-(?:amz|goog|oss|cos|ms)-.*|sig|signature|key|code|policy|expires?|hmac|hash|ticket|"
    r"awsaccesskeyid|googleaccessid|key-pair-id|se|sv|skoid|token.*|auth.*|pass.*",
    re.IGNORECASE,
)
_NO_TEXT = frozenset(("", "null", "none", "~", "true", "false", REDACTED))


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


@lru_cache(maxsize=4096)
def is_secret_name(key: str) -> bool:
    """Whether values under this key are secrets, whatever they look like."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", _plain(key)).lower())
    if not words:
        return False
    joined = "_".join(words)
    if words[-1] in ("token", "key") and len(words) > 1 and _NO_SECRET.fullmatch(words[-2]):
        return False
    if words[-1] in ("id", "ids") or joined.startswith("num_"):
        return bool(re.search("aws_|access_key_id|secret", joined))
    return (
        any(map(_SECRET_WORDS.fullmatch, words))
        or words[-1] in _LAST_WORDS
        or bool(_SECRET_PARTS.search(joined))
        or bool(_SECRET_PARTS.search("".join(words)))
    )


# Values ----------------------------------------------------------------------------------------

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
    if not _is_prose(key) and is_machine_path(text):
        return "is a path of this machine"
    return private_in(text)


def _is_prose(key: str) -> bool:
    """Whether values of a key are prose, which may begin like a path (``/no_think``)."""
    return key != "chat_template_jinja" and bool(_TEXT_KEY.fullmatch(key))


def private_in(text: str) -> str | None:
    """Returns why a text must not be shared: it has a secret, or identifies a person or machine.

    Returns None if it may be shared."""
    if (why := secret_in(text)) is not None:
        return why
    return next((why for part in _readings(text) if (why := _private(part)) is not None), None)


def secret_in(text: str) -> str | None:
    """Returns which kind of secret a text contains (token, key, password, signed URL), or None."""
    return next((why for part in _readings(text) if (why := _secret(part)) is not None), None)


def _readings(text: str) -> Iterator[str]:
    """Yields the text without invisible and look-alike characters, then its decoded forms.

    These are the text without HTML and percent escapes, and each base64 string in it, decoded."""
    plain = _plain(text)
    yield plain
    seen = {plain}
    for _ in range(2):
        again = html.unescape(unquote(plain))
        if again in seen:
            break
        seen.add(again)
        plain = again
        yield plain
    for word in _BASE64.findall(plain):
        if (decoded := _decoded(word)) is not None:
            yield decoded


#: Letters of other alphabets that look like Latin letters.
_ALIKE = str.maketrans(
    "аеорсухіѕјԁԛԝһӏкмтвнАВЕКМНОРСТХІЅЈοανρτκιυχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxisjdqwhlkmtbhABEKMHOPCTXISJoavptkiuxABEZHIKMNOPTYX",
)


def _plain(text: str) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if unicodedata.category(c) != "Cf").translate(_ALIKE)


_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")


def _decoded(word: str) -> str | None:
    """Decodes a base64 string. Returns None if the result is not printable text."""
    word = word.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        text = base64.b64decode(word + "=" * (-len(word) % 4), validate=True).decode()
    except ValueError:
        return None
    return text if all(c.isprintable() or c in "\n\r\t" for c in text) else None


_NOT_BEFORE = r"(?<![A-Za-z0-9])"
_TOKEN = re.compile(
    _NOT_BEFORE
    + r"(?:(?:hf_|api_org_|gsk_|npm_|r8_|rpa_|ntn_|tgp_v1_|xai-|whsec_|figd_|do[opr]_(?:v1_)?|"
    r"shp(?:at|ca|pa|ss)_|gh[pousr]_|[rsp]k_(?:live|test)_|hv[sb]\.|sntry[su]_|lin_api_)"
    r"[A-Za-z0-9]{12,}|"
    r"(?:github_pat_|sk-|pypi-|nvapi-|pplx-|dckr_pat_|GOCSPX-|ya29\.|AIza|wandb_v1_|eyJ|SG\.|"
    r"gl(?:pat|dt|rt|ptt|ft|imt|agent|soat|cbt|ffct|oas)-|gl(?:sa|c)_|xapp-|xox[a-z]-|sq0[a-z]{3}-)"
    r"[\w-]{10,}|"
    r"(?:A3T[A-Z0-9]|AKIA|ASIA|AGPA|AIDA|AROA|AIPA|ANPA|ANVA)[A-Z0-9]{12,}|dapi[0-9a-f]{32}|"
    r"\d{8,10}:[\w-]{35}(?!\w)|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}(?!\w))"
)
#: The digits of a commit, recognised by the text before them.
_COMMIT = re.compile(
    r"(revision[ =]|@|(?:resolve|commit|tree|blob|raw)/|githubusercontent\.com/[\w.-]+/[\w.-]+/)"
    r"[0-9a-f]{40}(?![0-9A-Za-z])"
)
_HEX = re.compile(_NOT_BEFORE + r"[0-9a-fA-F]{32,}(?![A-Za-z0-9])")
_HOOKS = re.compile(
    r"hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|open-apis/bot|dingtalk\.com/robot|"
    r"webhook|/hooks?/|api\.telegram\.org/bot|chat\.googleapis\.com|hooks\.zapier\.com|"
    r"maker\.ifttt\.com|ntfy\.sh/|ftqq\.com",
    re.IGNORECASE,
)
_SECRETS = (
    (_TOKEN, "looks like a token or a key"),
    (_HEX, "looks like a token or a key"),
    (re.compile(r"-----BEGIN |PuTTY-User-Key|\bssh-(?:rsa|dss|ed25519) AAAA"), "has a key file"),
    (
        re.compile(r"://(?:[^\s/?#]*@|[^\s/?#@]+:[^\s@]*@)"),
        "has the user or the password of a URL",
    ),
    (
        re.compile(
            r"\b(?:jdbc:|(?:postgres(?:ql)?|mysql|mariadb|mongodb|rediss?|amqps?|mssql|oracle|"
            r"clickhouse|snowflake|kafka|nats|ldaps?|smtps?|imaps?|s?ftp|ssh)(?:\+\w+)?://)",
            re.IGNORECASE,
        ),
        "has the address of a server",
    ),
    (
        re.compile(
            r"\bbearer\s+[\w.~+/=-]{6,}|"
            r"\bbasic\s+(?=[\w+/-]*(?:\d|=))[\w+/-]{8,}={0,2}|\bauthorization\s*[:=]",
            re.IGNORECASE,
        ),
        "has an Authorization header",
    ),
    (
        re.compile(
            r"\b(?:pass(?:word|wd|phrase|code)|pwd|secret|api[ _-]?key)s?\b['\"]?\s*"
            r"(?:\bis\b|=|:|\bare\b)\s*[^\s=]{3,}",
            re.IGNORECASE,
        ),
        "says a password or a secret",
    ),
    (re.compile(r"(?:^|\s)-u\s+\S+:\S+"), "says a password or a secret"),
)
_PARAMETER = re.compile(r"[?&;]([^\s=?&;#]+)=([^\s&;#]+)")
_ASSIGNED = re.compile(
    r"(?:(?<![\w-])--(?P<option>[A-Za-z][\w-]*)[ =]+|"
    r"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)['\"]?\s*(?:=(?!=)|:)\s*['\"]?)"
    r"(?P<value>[^\s'\"&;,{}<>|()]{3,})"
)
_WORD = re.compile(r"[A-Za-z0-9+/_=-]{20,}")


def _secret(text: str) -> str | None:
    text = _COMMIT.sub(r"\1", text)
    for pattern, why in _SECRETS:
        if pattern.search(text):
            return why
    if "://" in text and _HOOKS.search(text):
        return "has the address of a webhook"
    for name, value in _PARAMETER.findall(text):
        if _SIGNING.fullmatch(name) or is_secret_name(name) or _is_random(value):
            return "has a signed URL"
    for found in _ASSIGNED.finditer(text):
        name = found["option"] or found["name"]
        bare = name.lower() in _LAST_WORDS and found["option"] is None
        if bare and not re.match(rf"{name}=\w", found[0]):
            continue
        if is_secret_name(name) and found["value"].lower() not in _NO_TEXT:
            return "says a password or a secret"
    if any(True for detector in _detectors() for _ in detector.analyze_string(text)):
        return "looks like a token or a key"
    if any(map(_is_random, _WORD.findall(text))):
        return "looks random, as tokens and keys do"
    return None


@cache
def _detectors() -> tuple[Any, ...]:
    """The detectors of detect-secrets that match a fixed pattern.

    This module has its own rules for entropy, names of keys and addresses."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    classes: Iterable[Any] = get_mapping_from_secret_type_to_class().values()
    return tuple(
        kind()
        for kind in classes
        if issubclass(kind, RegexBasedDetector) and kind.__name__ != "IPPublicDetector"
    )


def _is_random(word: str) -> bool:
    """Whether lower case, upper case and digits alternate as often as in a random string.

    They do not in the name of a model."""
    if len(word) < 20:
        return False
    kinds = [
        "a" if c.islower() else "A" if c.isupper() else "0" if c.isdigit() else "" for c in word
    ]
    changes = sum(a != b and "" not in (a, b) and a + b != "Aa" for a, b in pairwise(kinds))
    return changes >= (0.25 if len(word) < 32 else 0.2) * len(word)


_WHOLE_PATH = re.compile(
    r"(?:file:|~[\w.-]*(?:[/\\]|$)(?!$)|~$|//?(?=\w)|/$|[A-Za-z]:[\\/](?![\\/])|\\\\(?=\w))"
    r"(?!.*[{<|]).*"
)
_PATHS = re.compile(
    r"(?<![\w/.<>~\-*\]}])(?:/[\w.@+-]+){2,}"
    r"|(?<![\w.])~[\w-]*/\w|(?<!\w)[A-Za-z]:[\\/](?![\\/])\w|\\\\[\w.-]+\\\w|\bfile:/"
    r"|(?:\.\./)+(?:home|Users)/\w|(?:^|[\s'\"=(])(?:/home|/root|/Users)/\w"
)
_EMAIL = re.compile(
    r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"
    r"|(?<![\w./@-])[\w.-]{1,64}@[\w.-]+:[~/\w]"
)
_HOSTS = re.compile(
    r"[\w-]\.(?:internal|intranet|corp|local|localdomain|lan|home|private|consul|onion)"
    r"(?![\w-]|\.\w)"
    r"|\b(?:https?|wss?|grpcs?|tcp|udp)://(?:[\w-]+(?=[:/?#\s]|$)|\[)"
    r"|(?<![\w/@.-])[A-Za-z][\w-]*(?:\.[\w-]+)+:\d{2,5}(?!\d)"
    r"|^[A-Za-z][\w-]*:\d{2,5}$|(?<![\w/@.:-])[A-Za-z][\w-]*:\d{4,5}(?![\w.])",
    re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:|:){2,7}[0-9a-fA-F]{1,4}(?![\w:])")


def _private(text: str) -> str | None:
    if _PATHS.search(text):
        return "has a path of this machine"
    if _EMAIL.search(text):
        return "has an e-mail address"
    if _HOSTS.search(text) or any(map(_is_address, _IPV4.findall(text) + _IPV6.findall(text))):
        return "has the name or the address of a host"
    return None


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6 and len(text) < 5:  # a slice in Python code, such as `1::2`
        return False
    return not (address.is_loopback or address.is_unspecified)
