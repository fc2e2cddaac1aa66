"""What a host may ask for and B-DPO cannot honour: one check, and a table for each host.

Standard library only: it is imported before torch.
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

#: The values by which a configuration says that a key is not used.
OFF: tuple[Any, ...] = (False, "", [], {})


class Limit(NamedTuple):
    """A key of a host of which B-DPO can honour some values only.

    Attributes:
        key: what the host calls it.
        why: no other value can be honoured.
        honoured: the values that can be; None, which is a key left out, always can.
        remedy: what to do about any other.
        verdict: what is said of any other.
    """

    key: str
    why: str
    honoured: tuple[Any, ...] = OFF
    remedy: str = "Remove it."
    verdict: str = "cannot be used"


def check_limits(values: Mapping[str, Any], limits: Iterable[Limit], run: str) -> None:
    """Refuse the first key whose value cannot be honoured.

    Args:
        values: a host's configuration by its keys.
        limits: the host's table.
        run: by which the host's user asks for B-DPO, for the message.

    Raises:
        BDPOError: with the key, its value, the reason and the remedy.
    """
    for limit in limits:
        value = values.get(limit.key)
        if value is not None and value not in limit.honoured:
            raise BDPOError(
                f"`{limit.key}: {value}` {limit.verdict} with {run}: {limit.why}. {limit.remedy}"
            )


def check_complete(values: Mapping[str, Any]) -> None:
    """Refuse a configuration of which something was left out before it was shared.

    Args:
        values: a host's configuration by its keys; what `bdpo_recipe` says is not looked at.

    Raises:
        BDPOError: with the first such key and what to do.
    """
    from bdpo_plugin.redact import missing, place_words  # whose patterns take long to compile

    for place, is_text in missing({k: v for k, v in values.items() if k != RECIPE}):
        raise BDPOError(f"`{place_words(place)}` {missing_message(is_text)}")


def missing_message(is_text: bool) -> str:
    """What to say of a key whose value was left out, in words that go on from its name."""
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
    """Refuse ``bdpo_*`` keys in a configuration that does not ask for B-DPO.

    Args:
        values: a host's configuration by its keys; None counts as left out.
        said: what it says in the place of `wanted`.
        wanted: by which the host's user asks for B-DPO.

    Raises:
        BDPOError: with the keys and what to do.
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
    """The loss types of a run, as a list, or a refusal that names the host's key.

    Args:
        loss_types: one name, or a list of them.
        label_smoothing: the host's value; None counts as left out.
        type_key, smoothing_key: what the host calls the two.

    Raises:
        BDPOError: a loss that is not in :data:`LOSS_TYPES`, no per-pair loss among them, or a
            label smoothing that no loss of the run reads or that is out of range.
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
