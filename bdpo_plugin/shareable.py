"""What must not leave a machine with a configuration: keys and tokens. Standard library only."""

from __future__ import annotations

import re

LEFT_OUT = "(left out)"

#: What looks like a token or a key of somebody's; a commit is named as one.
_SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-)\w[\w-]{15,}"
    r"|(?<!revision[ =])(?<!@)\b[0-9a-f]{40}\b"
)
#: Keys of a configuration whose texts are secrets, whatever they look like, and such as are none.
_SECRET_KEY = re.compile(r"(?:^|_)(?:token|key|secret|password)$", re.IGNORECASE)
_NO_SECRET_KEY = re.compile(
    r"^(?:(?:bos|eos|pad|unk|mask|sep|cls)_token|template_thinking_key|comet_experiment_key)$"
)
#: Keys whose values are commits of the hub, which look as keys of W&B do.
_COMMIT_KEY = re.compile(r"(?:^|_)(?:revision|revision_of_model|commit)$")
_ENTRY = re.compile(r"^(\s*(?:- )?)([\w.-]+)(\s*:\s+)(.*)$")
#: What a key may have in the place of a text.
_NO_TEXT = ("", "null", "~", "true", "false")


def is_secret(key: str, value: object) -> bool:
    """Whether an entry of a configuration looks like a token or a key of somebody's."""
    if not isinstance(value, str) or value in ("", LEFT_OUT) or _COMMIT_KEY.search(key):
        return False
    named = _SECRET_KEY.search(key) and not _NO_SECRET_KEY.search(key)
    return bool(named or _SECRET.search(value))


def without_secrets(text: str) -> str:
    """The text of a YAML file without what looks like a token or a key of somebody's."""
    return "\n".join(map(_without, text.split("\n")))


def _without(line: str) -> str:
    entry = _ENTRY.match(line)
    if entry is None:
        return _SECRET.sub(LEFT_OUT, line)
    before, key, colon, rest = entry.groups()
    value = rest.partition(" #")[0].strip().strip("'\"")
    if value in _NO_TEXT or value.startswith("#") or _COMMIT_KEY.search(key):
        return line
    return f"{before}{key}{colon}{LEFT_OUT}" if is_secret(key, value) else line
