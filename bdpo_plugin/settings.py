"""Every key of the method, once, and the only code that validates them.

A host declares the keys of :func:`BDPOSettings.keys` in whatever form it wants and hands the
raw values to :meth:`BDPOSettings.from_keys`; nothing else in the package checks a setting.
Standard library only: this module is imported before torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

PREFIX = "bdpo_"
#: A mapping that says what a configuration is and what came of it. No run reads it.
RECIPE = "bdpo_recipe"

WEIGHTINGS = ("softmax", "power")
MI_ESTIMATORS = ("pointwise", "expected")
CONTROLS = ("shuffled", "swapped", "random")

#: Per-pair losses that are functions of the two (weighted) log-ratios; method section 7.
PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
#: What a host's `loss_type` may name: the per-pair losses, and the additive term of the trainer.
LOSS_TYPES = (*PAIR_LOSSES, "sft")


#: How alike, from 0 to 1, a key must be to one that is suggested for it.
_NEAR = 0.7
#: The largest number of float32, in which the weights are computed.
_MAX_ALPHA = (2 - 2**-23) * 2.0**127
#: What kernels can count.
_MAX_TOKENS = 2**31 - 1


class BDPOError(ValueError):
    """A B-DPO run that cannot be honoured as asked. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class BDPOSettings:
    """The settings of B-DPO, validated. The key of field ``x`` is ``bdpo_x`` in every host.

    Sections are those of docs/method.md.

    Attributes:
        alpha: strength of the balancing, dimensionless if ``mi_normalize`` (1 / (nats per
            token)), from 0 to what float32 can hold; 0 is exactly DPO. Method section 5.
        weighting: MI of a pair -> weights, ``softmax`` or ``power``; section 5.
        balance: use the balance weights; False is the "SF only" ablation; section 7.
        scaling: use the scaling factor; False is the "BW only" ablation; section 7.
        mi_estimator: ``pointwise`` or ``expected``; section 3.
        mi_normalize: divide the MI by the response's length: nats per token, not nats.
        null_prompt: the query-free prompt, as text; None derives it from the tokenizer's chat
            template or the data; section 4.
        precompute: score the whole dataset before training; False scores each batch in its step.
        score_tokens: tokens of one batch of the reference pass, at most; None: 1024 on a CPU, and
            on a GPU from 4096 to 16384, as its free memory allows.
        cache_dir: where computed scores are kept; None is ``bdpo`` under the user's cache.
        control: weigh the pairs by mutual information that is not their own, to see what B-DPO
            owes to it: ``shuffled`` among all pairs, ``shuffled:COLUMN`` among those with the same
            value in a column of the data, ``swapped`` within each pair, or ``random``: shuffled,
            and swapped in every other pair or so. None is B-DPO.
    """

    alpha: float = 1.5
    weighting: str = "softmax"
    balance: bool = True
    scaling: bool = True
    mi_estimator: str = "pointwise"
    mi_normalize: bool = True
    null_prompt: str | None = None
    precompute: bool = True
    score_tokens: int | None = None
    cache_dir: str | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        alpha = as_number(self.alpha, "bdpo_alpha")
        if not 0 <= alpha <= _MAX_ALPHA:
            raise refusal(
                "bdpo_alpha", self.alpha, "a finite number >= 0 (0 is exactly DPO), at most 3.4e38"
            )
        put("alpha", alpha)
        for name, choices in (("weighting", WEIGHTINGS), ("mi_estimator", MI_ESTIMATORS)):
            if (value := getattr(self, name)) not in choices:
                raise refusal(PREFIX + name, value, " or ".join(f"'{c}'" for c in choices))
        for name in ("balance", "scaling", "mi_normalize", "precompute"):
            if not isinstance(value := getattr(self, name), bool):
                raise refusal(PREFIX + name, value, "true or false")
        if self.null_prompt is not None:
            _check_text(self.null_prompt, "bdpo_null_prompt")
        if self.cache_dir is not None:
            folder = self.cache_dir
            put("cache_dir", os.fspath(folder) if isinstance(folder, os.PathLike) else folder)
            _check_folder(self.cache_dir, "bdpo_cache_dir")
        if self.score_tokens is not None:
            tokens = as_number(self.score_tokens, "bdpo_score_tokens")
            if not (1 <= tokens <= _MAX_TOKENS and tokens == int(tokens)):
                allowed = f"a whole number from 1 to {_MAX_TOKENS}"
                raise refusal("bdpo_score_tokens", self.score_tokens, allowed)
            put("score_tokens", int(tokens))
        if self.control is not None:
            self._check_control()

    def _check_control(self) -> None:
        kind, colon, column = str(self.control).partition(":")
        if kind not in CONTROLS or (colon and not (kind == "shuffled" and column)):
            allowed = " or ".join(f"'{c}'" for c in (*CONTROLS, "shuffled:COLUMN"))
            raise refusal("bdpo_control", self.control, allowed)
        if kind != "swapped" and not self.precompute:
            raise BDPOError(
                f"`bdpo_control: {self.control}` cannot be used with `bdpo_precompute: false`: it "
                "shuffles a whole dataset. Set `bdpo_precompute: true`, or `bdpo_control: swapped`."
            )

    @property
    def weighs(self) -> bool:
        """Whether the mutual information decides anything: at ``alpha`` 0, and without both
        weights and scale, each weight is 1 whatever it is."""
        return self.alpha != 0 and (self.balance or self.scaling)

    @property
    def control_kind(self) -> str | None:
        """Which of :data:`CONTROLS` the run is, if it is one."""
        return (self.control or "").partition(":")[0] or None

    @property
    def control_column(self) -> str | None:
        """The column within whose values the control shuffles, if it names one."""
        return (self.control or "").partition(":")[2] or None

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The keys a user may write, in the order of the README's table."""
        return tuple(PREFIX + f.name for f in fields(cls))

    @classmethod
    def from_keys(cls, values: Mapping[str, Any]) -> BDPOSettings:
        """Settings from a host's configuration: its ``bdpo_*`` entries; all others are ignored.

        An entry of None counts as left out, as hosts fill their undeclared defaults with it, and
        so does :data:`RECIPE`.

        Raises:
            BDPOError: an unknown ``bdpo_*`` key (with the nearest known one), or a bad value.
        """
        ours = {k: v for k, v in values.items() if k.startswith(PREFIX) and k != RECIPE}
        known = cls.keys()
        for key in ours:
            if key not in known:
                raise BDPOError(unknown_key_message(key))
        return cls(**{k.removeprefix(PREFIX): v for k, v in ours.items() if v is not None})

    def to_keys(self) -> dict[str, Any]:
        """The inverse of :meth:`from_keys`."""
        return {PREFIX + name: value for name, value in asdict(self).items()}

    def check_precompute(self, theirs: bool | None) -> None:
        """Refuse a host's `precompute_ref_log_probs` that says otherwise than ``precompute``.

        Raises:
            BDPOError: it is neither left out (None) nor the same.
        """
        if theirs not in (None, self.precompute):
            raise BDPOError(
                f"`precompute_ref_log_probs: {theirs}` contradicts `bdpo_precompute: "
                f"{self.precompute}`, which decides: one pass gives both log-probabilities and "
                "mutual information. Remove the former."
            )


def unknown_key_message(key: str, known: Iterable[str] | None = None) -> str:
    """What to say of a key that is none of the `known`, which are B-DPO's unless told."""
    near = difflib.get_close_matches(key, known or BDPOSettings.keys(), n=1, cutoff=_NEAR)
    message = f"Unknown key `{key}`."
    if near:
        message += f" Did you mean `{near[0]}`?"
    if known is None:
        message += f" The keys of B-DPO are: {', '.join(BDPOSettings.keys())}."
    elif not near:
        message += " No known key is like it: remove it."
    return message


def as_number(value: Any, key: str) -> float:
    # A YAML 1.1 reader hands `1e-1` over as a string; numpy's numbers are real ones too.
    if isinstance(value, (Real, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise refusal(key, value, "a number")


def _check_text(value: Any, key: str) -> None:
    if not (isinstance(value, str) and value.strip()):
        raise refusal(key, value, "text that is more than white space, or left out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(key, value, "text in Unicode, without half a surrogate pair") from None


def _check_folder(value: Any, key: str) -> None:
    _check_text(value, key)
    try:
        path = Path(value).expanduser()
        # the first of its folders that is there
        there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
        usable = "\0" not in value and (there is None or there.is_dir())
    except PermissionError:  # the store says so, and goes on without
        usable = True
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user
        usable = False
    if not usable:
        raise refusal(key, value, "a folder, or one that can be made")


def refusal(key: str, value: Any, allowed: str) -> BDPOError:
    return BDPOError(f"`{key}: {value!r}` cannot be used: it must be {allowed}.")
