"""Checks for options of a host that B-DPO cannot honour. Each host defines its own table of them.

Standard library only, as this module is imported before torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bdpo_plugin.settings import (
    LOSS_TYPES,
    PAIR_LOSSES,
    PREFIX,
    RECIPE,
    BDPOError,
    as_number,
    refusal,
)

#: Values that mean in a configuration that an option is not used.
OFF: tuple[Any, ...] = (False, "", [], {})


class Limit(NamedTuple):
    """An option of a host of which B-DPO can honour only some values.

    Attributes:
        key: the name of the option in the host.
        why: the reason why no other value can be honoured, for the message.
        honoured: the values that can be honoured. None, which means "not set", always can.
        remedy: what the user should do about any other value, for the message.
        verdict: the part of the message that follows a value that cannot be honoured.
    """

    key: str
    why: str
    honoured: tuple[Any, ...] = OFF
    remedy: str = "Remove it."
    verdict: str = "cannot be used"


def check_limits(values: Mapping[str, Any], limits: Iterable[Limit], run: str) -> None:
    """Checks that B-DPO can honour the value of every option.

    Args:
        values: a host's configuration, by its keys.
        limits: the host's table of limited options.
        run: the key with which the host's users ask for B-DPO, for the message.

    Raises:
        BDPOError: a value cannot be honoured. The message has the first such key, its value, the
            reason and the remedy.
    """
    for limit in limits:
        value = values.get(limit.key)
        if value is not None and value not in limit.honoured:
            raise BDPOError(
                f"`{limit.key}: {value}` {limit.verdict} with {run}: {limit.why}. {limit.remedy}"
            )


def check_complete(values: Mapping[str, Any]) -> None:
    """Checks that no value of a configuration was redacted before it was shared.

    Args:
        values: a host's configuration, by its keys. The mapping `bdpo_recipe` is not checked.

    Raises:
        BDPOError: a value was redacted. The message has the first such key and what to do.
    """
    from bdpo_plugin.redact import missing, place_words  # its patterns take long to compile

    for place, is_text in missing({k: v for k, v in values.items() if k != RECIPE}):
        raise BDPOError(f"`{place_words(place)}` {missing_message(is_text)}")


def missing_message(is_text: bool) -> str:
    """Returns the message about a redacted value. It continues a sentence that names the key."""
    if is_text:
        return (
            "needs its text, which was left out of this recipe. Ask whoever shared it for one made "
            "by `bdpo recipes bundle --with-texts`, or write the text there."
        )
    return (
        "needs its value, which was left out of this recipe, as it was a secret or named a person "
        "or a machine. Write there what others may read."
    )


def check_no_keys(values: Mapping[str, Any], said: str, wanted: str) -> None:
    """Checks that a configuration that does not ask for B-DPO has no ``bdpo_*`` keys.

    Args:
        values: a host's configuration, by its keys. None means "not set".
        said: what the configuration has instead of `wanted`, for the message.
        wanted: the key and value with which the host's users ask for B-DPO, for the message.

    Raises:
        BDPOError: there are such keys. The message lists them and says what to do.
    """
    keys = [
        key
        for key, value in values.items()
        if str(key).startswith(PREFIX) and key != RECIPE and value is not None
    ]
    if keys:
        raise BDPOError(
            f"`{keys[0]}` has no effect with `{said}`. Write `{wanted}`, or remove: "
            f"{', '.join(keys)}. (Plain DPO with the same YAML: `bdpo_alpha: 0`.)"
        )


def check_loss(
    loss_types: Any, label_smoothing: Any, *, type_key: str, smoothing_key: str
) -> list[str]:
    """Returns the loss types of a run as a list, after checking them.

    Args:
        loss_types: one name, or a list of names.
        label_smoothing: the host's value; None means "not set".
        type_key, smoothing_key: the host's names of the two options, for the messages.

    Raises:
        BDPOError: a loss is not in :data:`LOSS_TYPES`, none of the losses is a per-pair loss, or
            the label smoothing is out of range or is read by none of the losses.
    """
    names = list(loss_types) if isinstance(loss_types, list | tuple) else [loss_types]
    for name in names:
        if name not in LOSS_TYPES:
            raise BDPOError(
                f"`{type_key}: {name}` is not supported by B-DPO: its balance weights are defined "
                f"for losses of the two log-ratios. Supported: {', '.join(LOSS_TYPES)} "
                "('sft' only beside one of the others)."
            )
    if not set(names) & set(PAIR_LOSSES):
        raise BDPOError(
            f"`{type_key}: {names}` has no preference loss to balance. "
            f"Add one of: {', '.join(PAIR_LOSSES)}."
        )
    smoothing = 0.0 if label_smoothing is None else as_number(label_smoothing, smoothing_key)
    if "robust" in names:
        if not 0 <= smoothing < 0.5:
            raise refusal(smoothing_key, label_smoothing, "a number in [0, 0.5)")
    elif smoothing:
        raise BDPOError(
            f"`{smoothing_key}: {label_smoothing}` has no effect on `{type_key}: {names}`, as only "
            "'robust' reads it. Add 'robust' to the losses, or remove it."
        )
    return names
