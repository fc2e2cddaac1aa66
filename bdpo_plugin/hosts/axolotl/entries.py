"""Checks and restores the entries of `datasets` and `test_datasets`, as the user wrote them.

Under `rl: dpo` Axolotl silently drops most keys of an entry, including some that its own loader and
the function named by `type` would read. It also formats an evaluation set with the entry of
`datasets` in the same position. A B-DPO run restores the keys of each entry while it is loaded
(:func:`written_entries_restored`). Keys that nothing would read raise an error before anything is
loaded (:func:`check_entries`).
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

#: Key of an entry that a B-DPO run is loading: the name that messages use for its dataset, or "" if
#: it is the only one.
NAME = "name_of_bdpo"

#: Keys that Axolotl's dataset loader reads.
_LOADED = ("path", "type", "split", "name", "data_files", "ds_type", "revision")
_FIELDS = ("field_messages", "field_chosen", "field_rejected")
_TEMPLATE = ("chat_template", "chat_template_jinja")
_MESSAGES = ("message_property_mappings", "message_field_role", "message_field_content")
#: Groups of keys that an evaluation entry takes over from the training entry in the same position,
#: unless it sets one of the same group itself.
_GROUPS = (*((field,) for field in _FIELDS), _TEMPLATE, _MESSAGES, ("roles",))
#: `type` -> the keys of an entry that its function for preference data reads.
_READ = {
    "chat_template.default": (*_FIELDS, *_TEMPLATE, *_MESSAGES, "roles"),
    "chat_template.argilla_chat": (*_FIELDS[1:], *_TEMPLATE, *_MESSAGES, "roles"),
}
_BUILT_IN = ("chat_template", "chatml", "llama3", "passthrough", "user_defined", "zephyr")

_ALL_TRAINED = "in preference training the loss is on all tokens of a response, and on no others"
_TEXT = "in preference training Axolotl hands the chat template no more than roles and contents"
#: Keys that Axolotl honours only in supervised fine-tuning. The values that are allowed describe
#: what preference training does anyway.
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
    """Checks that Axolotl would not drop any key of an entry of a B-DPO configuration.

    Args:
        cfg: the configuration, before Axolotl has validated it.

    Raises:
        BDPOError: a key would be dropped. The message has its path, its value, the reason and the
            remedy.
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
    if read is None:  # a function of the user's, which may read any key
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
    """Returns the keys that are set, without those that only hold YAML anchors (``_...``)."""
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
    """Returns the keys that the function named by a `type` reads, or None if it is unknown."""
    if not isinstance(kind, str) or not kind:
        return ()
    name = kind if "." in kind else f"{kind}.default"
    if name.rpartition(".")[0] in _BUILT_IN:
        return _READ.get(name, ())
    return None


def makes_no_difference(entry: Mapping[str, Any], key: str | int | None) -> bool:
    """Whether Axolotl's loader behaves the same without this key of the entry."""
    if key != "ds_type":
        return False
    path = DictDefault(path=str(entry.get("path")))
    return bool(entry[key] == get_dataset_type(path))


def written_entries(cfg: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the entries as the user wrote them, to be stored under :data:`ENTRIES`."""
    return {
        place: [DictDefault(entry).to_dict() for entry in cfg.get(place) or []]
        for place in ("datasets", "test_datasets")
    }


@contextmanager
def written_entries_restored(cfg: DictDefault, split: str) -> Iterator[None]:
    """Context manager in which a validated configuration has the entries that the user wrote.

    The entries of the split that is being loaded are in `datasets` too, as the functions that
    format the rows read them there.

    Args:
        cfg: the configuration of a B-DPO run.
        split: ``train`` or ``test``.
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
    if len(written) != len(validated):  # Axolotl has added some itself
        written = validated
    entries = []
    for said in written:
        read = _read_by(said.get("type"))
        wanted = [key for key in _written(said) if read is None or key in (*read, *_LOADED)]
        entry = DictDefault({key: said[key] for key in wanted})
        if entry.chat_template_jinja and not entry.chat_template:
            entry["chat_template"] = "jinja"  # Axolotl does this in supervised fine-tuning
        entry["type"] = entry.type or "passthrough"  # so that rows without a type are checked too
        entry[NAME] = "" if len(validated) == 1 else str(entry.path)
        entries.append(entry)
    return entries


def _fill(entry: DictDefault, other: DictDefault) -> None:
    """Copies keys from `other` that `entry` does not set itself, as Axolotl would read them."""
    read = _read_by(entry.get("type")) or ()
    for group in _GROUPS:
        if not any(entry.get(key) is not None for key in group):
            for key in group:
                if key in read and other.get(key) is not None:
                    entry[key] = other[key]
