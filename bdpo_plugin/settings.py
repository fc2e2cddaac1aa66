"""All settings of the method, and the only code that validates them.

A host declares the keys of :func:`BDPOSettings.keys` in whatever form it needs and passes the raw
values to :meth:`BDPOSettings.from_keys`. Nothing else in the package validates a setting.
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
#: Key of the mapping that describes a configuration and its results. Training ignores it.
RECIPE = "bdpo_recipe"

WEIGHTINGS = ("softmax", "power")
MI_ESTIMATORS = ("pointwise", "expected")
CONTROLS = ("shuffled", "swapped", "random")
#: Keys that change no number of a run; of the null prompt its token ids count, not how it is given.
UNIMPORTANT = ("bdpo_cache_dir", "bdpo_score_tokens", "bdpo_precompute", "bdpo_null_prompt")

#: Per-pair losses that are functions of the two (weighted) log-ratios; method section 7.
PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
#: Values allowed for a host's `loss_type`: the per-pair losses, and the trainer's additive term.
LOSS_TYPES = (*PAIR_LOSSES, "sft")


#: Similarity, from 0 to 1, from which a known key is suggested for an unknown one.
_NEAR = 0.7
#: The largest finite number of float32, in which the weights are computed.
_MAX_ALPHA = (2 - 2**-23) * 2.0**127
#: The largest number of tokens that a kernel can index.
_MAX_TOKENS = 2**31 - 1


class BDPOError(ValueError):
    """Raised if B-DPO cannot honour a configuration. The message says what the user should do."""


@dataclass(frozen=True, kw_only=True)
class BDPOSettings:
    """The validated settings of B-DPO. Field ``x`` has the key ``bdpo_x`` in every host.

    Section numbers refer to docs/method.md.

    Attributes:
        alpha: strength of the balancing, from 0 to the largest float32. Its unit is 1 / (nats per
            token) with ``mi_normalize``, else 1 / nats. 0 is exactly DPO. Section 5.
        weighting: the function that turns the MI of a pair into weights, ``softmax`` or ``power``;
            section 5.
        balance: whether to use the balance weights. False is the "SF only" ablation; section 7.
        scaling: whether to use the scaling factor. False is the "BW only" ablation; section 7.
        mi_estimator: ``pointwise`` or ``expected``; section 3.
        mi_normalize: whether to divide the MI by the length of the response, so that it is in nats
            per token instead of nats.
        null_prompt: the text of the null prompt, which contains no query. None derives it from the
            tokenizer's chat template or from the data; section 4.
        precompute: whether to score the whole dataset before training. False scores each batch in
            its training step.
        score_tokens: the maximum number of tokens in one batch of the reference pass. None means
            1024 on a CPU and, on a GPU, from 4096 to 16384, depending on its free memory.
        cache_dir: the folder that keeps computed scores. None is ``bdpo`` in the user's cache.
        control: replaces the mutual information of each pair by that of other responses, as a
            control experiment: ``shuffled`` permutes it among all pairs, ``shuffled:COLUMN`` among
            pairs with the same value in a column of the data, ``swapped`` exchanges it within each
            pair, and ``random`` shuffles it and swaps it in about every other pair. None is B-DPO.
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
        """Whether the mutual information has any effect. It has none if ``alpha`` is 0, or if
        neither weights nor scaling are used: all weights are then 1."""
        return self.alpha != 0 and (self.balance or self.scaling)

    @property
    def control_kind(self) -> str | None:
        """The kind of the control experiment, one of :data:`CONTROLS`, or None."""
        return (self.control or "").partition(":")[0] or None

    @property
    def control_column(self) -> str | None:
        """The column within whose values the control shuffles, or None."""
        return (self.control or "").partition(":")[2] or None

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Returns the keys that a user may write, in the order of the README's table."""
        return tuple(PREFIX + f.name for f in fields(cls))

    @classmethod
    def from_keys(cls, values: Mapping[str, Any]) -> BDPOSettings:
        """Creates settings from the ``bdpo_*`` entries of a host's configuration.

        All other entries are ignored, and so is :data:`RECIPE`. A value of None means "not set",
        as hosts fill the keys that a user does not set with it.

        Raises:
            BDPOError: a ``bdpo_*`` key is unknown (the message names the nearest known one), or a
                value is invalid.
        """
        ours = {k: v for k, v in values.items() if k.startswith(PREFIX) and k != RECIPE}
        known = cls.keys()
        for key in ours:
            if key not in known:
                raise BDPOError(unknown_key_message(key))
        return cls(**{k.removeprefix(PREFIX): v for k, v in ours.items() if v is not None})

    def to_keys(self) -> dict[str, Any]:
        """Returns the settings by their keys: the inverse of :meth:`from_keys`."""
        return {PREFIX + name: value for name, value in asdict(self).items()}

    def check_precompute(self, theirs: bool | None) -> None:
        """Checks that a host's `precompute_ref_log_probs` does not contradict ``precompute``.

        Raises:
            BDPOError: it is set (not None) and differs.
        """
        if theirs not in (None, self.precompute):
            raise BDPOError(
                f"`precompute_ref_log_probs: {theirs}` contradicts `bdpo_precompute: "
                f"{self.precompute}`, which decides: one pass gives both log-probabilities and "
                "mutual information. Remove the former."
            )


def unknown_key_message(key: str, known: Iterable[str] | None = None) -> str:
    """Returns the message about a key that is not in `known`, by default the keys of B-DPO."""
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
    # A YAML 1.1 parser returns `1e-1` as a string. Numbers of numpy are instances of Real too.
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
        # the nearest existing folder of the path
        there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
        usable = "\0" not in value and (there is None or there.is_dir())
    except PermissionError:  # the score store warns of it and continues without a cache
        usable = True
    except (OSError, RuntimeError, ValueError):  # the name is too long, or there is no such user
        usable = False
    if not usable:
        raise refusal(key, value, "a folder, or one that can be made")


def refusal(key: str, value: Any, allowed: str) -> BDPOError:
    return BDPOError(f"`{key}: {value!r}` cannot be used: it must be {allowed}.")
