"""Finds secrets and personal details in a text: tokens, passwords, addresses, hosts, paths.

A text has a secret if a detector of detect-secrets matches, if one of the rules below does, or if a
string in it looks random. detect-secrets is the best maintained library of its kind on the Python
index (gitleaks and trufflehog are programs, and presidio looks for names of persons). The rules
below cover what it leaves to others (addresses, hosts, paths, signed URLs) or matches too narrowly
(tokens of this field). No finding is verified, as that would need a network.
"""

from __future__ import annotations

import base64
import html
import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

#: Values that are none, in lower case.
NO_VALUES = frozenset(("", "null", "none", "~", "true", "false"))

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


# Texts -----------------------------------------------------------------------------------------


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
        if is_secret_name(name) and found["value"].lower() not in NO_VALUES:
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
