"""Adds the ``bdpo_*`` keys to LLaMA-Factory's fine-tuning arguments, and validates them."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import field, fields, make_dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args, get_type_hints

from bdpo_plugin.hosts.llamafactory.limits import LIMITS, check_trainer
from bdpo_plugin.limits import check_limits, check_no_keys
from bdpo_plugin.settings import BDPOError, BDPOSettings

PREF_LOSS = "bdpo"
TESTED = ("0.9.5",)
KEYS = BDPOSettings.keys()


def is_tested() -> bool:
    """Whether B-DPO has been tested with the installed release of LLaMA-Factory."""
    return version("llamafactory") in TESTED


def with_bdpo(base: Any) -> Any:
    """Returns a subclass of LLaMA-Factory's `FinetuningArguments` that supports B-DPO.

    It has the ``bdpo_*`` fields, None if not set, and accepts ``bdpo`` as a value of `pref_loss`.
    With any other `pref_loss` it behaves like `base`.
    """
    types = get_type_hints(BDPOSettings)
    keys = [
        (
            key,
            types[own.name] | None,
            field(default=None, metadata={"help": "B-DPO: see its README."}),
        )
        for key, own in zip(KEYS, fields(BDPOSettings), strict=True)
    ]
    pref_loss = next(f for f in fields(base) if f.name == "pref_loss")
    choices = (*get_args(get_type_hints(base)["pref_loss"]), PREF_LOSS)
    same = field(default=pref_loss.default, metadata=pref_loss.metadata)

    def __post_init__(self: Any) -> None:
        settings = resolve(self)
        base.__post_init__(self)
        if settings is not None:
            vars(self).update(settings.to_keys())

    def to_dict(self: Any) -> dict[str, Any]:
        own = () if self.pref_loss == PREF_LOSS else KEYS
        return {key: value for key, value in base.to_dict(self).items() if key not in own}

    return make_dataclass(
        base.__name__,
        [("pref_loss", Literal[choices], same), *keys],
        bases=(base,),
        namespace={
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "__post_init__": __post_init__,
            "to_dict": to_dict,
        },
    )


def resolve(args: Any) -> BDPOSettings | None:
    """Returns the settings of a B-DPO run, or None for any other run.

    Raises:
        BDPOError: a ``bdpo_*`` value is invalid, such a key is used without `pref_loss: bdpo`,
            B-DPO cannot honour an argument, or it has not been tested with this release of
            LLaMA-Factory.
    """
    if args.pref_loss != PREF_LOSS:
        _check_spelling(args)
        check_no_keys(vars(args), f"pref_loss: {args.pref_loss}", f"pref_loss: {PREF_LOSS}")
        return None
    if not is_tested():
        raise BDPOError(
            f"`pref_loss: bdpo` has not been tested with llamafactory {version('llamafactory')}, "
            f"so it is not activated. Install one of: {', '.join(TESTED)}."
        )
    if args.stage != "dpo":
        raise BDPOError(f"`pref_loss: bdpo` needs `stage: dpo`, not `stage: {args.stage}`.")
    settings = BDPOSettings.from_keys(vars(args))
    if settings.control_column is not None:
        raise BDPOError(
            f"`bdpo_control: {settings.control}` cannot be used in LLaMA-Factory, which keeps no "
            "column of the data when it tokenises it. Write `bdpo_control: shuffled`."
        )
    check_limits(vars(args), LIMITS, "`pref_loss: bdpo`")
    if os.environ.get("USE_MCA", "0").lower() in ("true", "y", "1"):
        raise BDPOError(
            "`USE_MCA=1` cannot be used with `pref_loss: bdpo`: Megatron's trainer is another one. "
            "Unset it."
        )
    check_trainer()
    return settings


def _check_spelling(args: Any) -> None:
    """Raises BDPOError if `pref_loss` is a misspelling of ``bdpo``.

    LLaMA-Factory does not validate the value in a YAML file, and trains `sigmoid` for an unknown
    one.
    """
    written = str(args.pref_loss)
    letters = re.sub("[^a-z]", "", written.lower())
    near = set(PREF_LOSS) <= set(letters) or (
        letters != "dpo" and difflib.get_close_matches(letters, [PREF_LOSS], cutoff=0.8)
    )
    if near and written not in get_args(get_type_hints(type(args))["pref_loss"]):
        raise BDPOError(
            f"Unknown loss `pref_loss: {written}`. Did you mean `pref_loss: {PREF_LOSS}`?"
        )
