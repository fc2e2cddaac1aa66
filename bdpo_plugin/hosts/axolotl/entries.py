"""The entries of `datasets` and `test_datasets`, as the user wrote them.

Under `rl: dpo` Axolotl drops most keys of an entry without a word, also such as its own loader and
the function that its `type` names would read; and it makes text of an evaluation set by the entry
of `datasets` in the same position. A B-DPO run gives each entry its keys back while it is loaded
(:func:`given_back`); what nothing would read is refused before anything is loaded
(:func:`check_entries`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from axolotl.utils.data.shared import get_dataset_type
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset, UserDefinedDPOType

from bdpo_plugin.hosts.axolotl.rewrite_config import ENTRIES
from bdpo_plugin.limits import OFF, Limit, check_limits
from bdpo_plugin.settings import BDPOError

#: In an entry that is being loaded for a B-DPO run: how its rows are called, "" for the only entry.
NAME = "name_of_bdpo"

#: Read by Axolotl's loader.
_LOADED = ("path", "type", "split", "name", "data_files", "ds_type", "revision")
_FIELDS = ("field_messages", "field_chosen", "field_rejected")
_TEMPLATE = ("chat_template", "chat_template_jinja")
_MESSAGES = ("message_property_mappings", "message_field_role", "message_field_content")
#: Of these one entry has what another one says, unless it has one of the same group itself.
_GROUPS = (*((field,) for field in _FIELDS), _TEMPLATE, _MESSAGES, ("roles",))
#: What the functions for preferences read of an entry, by the `type` that names them.
_READ = {
    "chat_template.default": (*_FIELDS, *_TEMPLATE, *_MESSAGES, "roles"),
    "chat_template.argilla_chat": (*_FIELDS[1:], *_TEMPLATE, *_MESSAGES, "roles"),
}
_BUILT_IN = ("chat_template", "chatml", "llama3", "passthrough", "user_defined", "zephyr")

_ALL_TRAINED = "in preference training the loss is on all tokens of a response, and on no others"
_TEXT = "in preference training Axolotl hands the chat template no more than roles and contents"
#: Keys that Axolotl honours in supervised fine-tuning, with the values that say what is done anyway
_LIMITS = (
    Limit("roles_to_train", _ALL_TRAINED, (["assistant"], ["gpt", "assistant"], *OFF)),
    Limit("train_on_eos", _ALL_TRAINED, ("turn", "last", "all")),
    Limit("train_on_eot", _ALL_TRAINED, ("turn", "last", "all")),
    Limit("message_field_training", _ALL_TRAINED),
    Limit("message_field_training_detail", _ALL_TRAINED),
    Limit(
        "drop_system_message",
        _TEXT,
        remedy="Remove it, and the messages of the role `system` from the data.",
    ),
    Limit("split_thinking", _TEXT),
    Limit("field_thinking", _TEXT),
    Limit("template_thinking_key", _TEXT),
    Limit("field_tools", _TEXT),
    Limit(
        "shards",
        "in preference training Axolotl loads a dataset whole",
        remedy="Take a part by `split: train[:50%]`.",
    ),
    Limit("shards_idx", "in preference training Axolotl loads a dataset whole"),
    Limit("preprocess_shards", "in preference training Axolotl loads a dataset at once"),
    Limit("trust_remote_code", "the package datasets runs no code of a dataset any more"),
)


def check_entries(cfg: Mapping[str, Any]) -> None:
    """Refuse what would be dropped of the entries of a B-DPO configuration.

    Args:
        cfg: before Axolotl has validated it.

    Raises:
        BDPOError: with the place, the value, the reason and the remedy.
    """
    for place in ("datasets", "test_datasets"):
        for number, entry in enumerate(cfg.get(place) or []):
            if isinstance(entry, Mapping):
                _check(f"{place}[{number}]", entry)


def _check(place: str, entry: Mapping[str, Any]) -> None:
    kind = entry.get("type")
    read = _read_by(kind)
    if isinstance(entry.get("name"), list):
        raise BDPOError(
            f"`{place}.name: {entry['name']}` cannot be used: Axolotl's preference training takes "
            "one name for an entry. Write an entry for each."
        )
    if isinstance(kind, Mapping):
        for key in _written(kind):
            if key not in UserDefinedDPOType.model_fields:
                raise _unknown(f"{place}.type.{key}", key, tuple(UserDefinedDPOType.model_fields))
    if read is None:  # a function of the user's, which may read any
        return
    check_limits(
        {f"{place}.{key}": value for key, value in entry.items()},
        (limit._replace(key=f"{place}.{limit.key}", verdict="has no effect") for limit in _LIMITS),
        "`rl: bdpo`",
    )
    limited = {limit.key for limit in _LIMITS}
    for key in _written(entry):
        if key in read or key in _LOADED or key in limited:
            continue
        if any(key in group for group in _GROUPS):
            words = f"`type: {kind}`" if isinstance(kind, str) else "a `type` that is a mapping"
            raise BDPOError(
                f"`{place}.{key}: {entry[key]}` has no effect: {words if kind else 'no `type`'} "
                f"does not read it. {_instead(key, kind)}"
            )
        known = (*read, *_LOADED, *sorted({*SFTDataset.model_fields} - {*read, *_LOADED}))
        raise _unknown(f"{place}.{key}", key, known)
    if entry.get("chat_template") == "jinja" and not entry.get("chat_template_jinja"):
        raise BDPOError(
            f"`{place}.chat_template: jinja` needs `{place}.chat_template_jinja`, the template or "
            "the path of a file with it."
        )


def _instead(key: str, kind: Any) -> str:
    if key in _FIELDS[1:] or (key == "field_messages" and isinstance(kind, Mapping)):
        field = {"field_messages": "field_prompt"}.get(key, key)
        if isinstance(kind, Mapping):
            return f"Write `{field}` into the mapping `type`."
    return "Remove it, or write a `type` that reads it: `chat_template.default`."


def _written(mapping: Mapping[str, Any]) -> list[str]:
    """The keys that say something, without those for YAML's anchors."""
    return [
        str(key)
        for key, value in mapping.items()
        if value is not None and value not in OFF and not str(key).startswith("_")
    ]


def _unknown(place: str, key: str, known: tuple[str, ...]) -> BDPOError:
    near = difflib.get_close_matches(key, known, n=1)
    meant = f"Did you mean `{near[0]}`?" if near else "Remove it."
    return BDPOError(f"`{place}` has no effect: Axolotl's preference training drops it. {meant}")


def _read_by(kind: Any) -> tuple[str, ...] | None:
    """The keys that the function which a `type` names reads; None where it is not known."""
    if not isinstance(kind, str) or not kind:
        return ()
    name = kind if "." in kind else f"{kind}.default"
    if name.rpartition(".")[0] in _BUILT_IN:
        return _READ.get(name, ())
    return None


def makes_no_difference(entry: Mapping[str, Any], key: str | int | None) -> bool:
    """Whether Axolotl's loader does what a key of an entry says without it too."""
    if key != "ds_type":
        return False
    path = DictDefault(path=str(entry.get("path")))
    return bool(entry[key] == get_dataset_type(path))


def kept(cfg: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the entries of a configuration as its file says, for :data:`ENTRIES`."""
    return {
        place: [DictDefault(entry).to_dict() for entry in cfg.get(place) or []]
        for place in ("datasets", "test_datasets")
    }


@contextmanager
def given_back(cfg: DictDefault, split: str) -> Iterator[None]:
    """While it lasts, a validated configuration has the entries that its file says.

    Those of the split that is loaded are in `datasets` too, where the functions that make text of
    the rows read them.

    Args:
        cfg: of a B-DPO run.
        split: ``train``, or ``test``.
    """
    before = {place: cfg.get(place) for place in ("datasets", "test_datasets")}
    training = _entries(cfg, "datasets")
    if split == "train":
        cfg["datasets"] = training
    else:
        entries = _entries(cfg, "test_datasets")
        for entry, other in zip(entries, training, strict=False):
            _fill(entry, other)
        cfg["datasets"] = cfg["test_datasets"] = entries
    try:
        yield
    finally:
        for place, entries in before.items():
            if entries is not None:
                cfg[place] = entries


def _entries(cfg: DictDefault, place: str) -> list[DictDefault]:
    validated = cfg.get(place) or []
    written = (cfg.get(ENTRIES) or {}).get(place) or []
    if len(written) != len(validated):  # Axolotl has made some itself
        written = validated
    entries = []
    for said in written:
        read = _read_by(said.get("type"))
        wanted = [key for key in _written(said) if read is None or key in (*read, *_LOADED)]
        entry = DictDefault({key: said[key] for key in wanted})
        if entry.chat_template_jinja and not entry.chat_template:
            entry["chat_template"] = "jinja"  # as Axolotl does in supervised fine-tuning
        entry["type"] = entry.type or "passthrough"  # so that its rows are checked as well
        entry[NAME] = "" if len(validated) == 1 else str(entry.path)
        entries.append(entry)
    return entries


def _fill(entry: DictDefault, other: DictDefault) -> None:
    """Give an entry what only another one says, as Axolotl would read it there."""
    read = _read_by(entry.get("type")) or ()
    for group in _GROUPS:
        if not any(entry.get(key) is not None for key in group):
            for key in group:
                if key in read and other.get(key) is not None:
                    entry[key] = other[key]
