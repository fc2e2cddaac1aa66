"""TRL's training arguments with the ``bdpo_*`` fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from bdpo_plugin.settings import BDPOSettings

_DEFAULT = BDPOSettings()


@dataclass
class BDPOArguments:
    """The ``bdpo_*`` fields alone, for a host that composes its own training arguments.

    :class:`~bdpo_plugin.settings.BDPOSettings` documents them, and
    :class:`~bdpo_plugin.hosts.trl.BDPOTrainer` validates them with that class.
    """

    bdpo_alpha: float = field(
        default=_DEFAULT.alpha, metadata={"help": "Strength of the balancing; 0 is exactly DPO."}
    )
    bdpo_weighting: str = field(
        default=_DEFAULT.weighting, metadata={"help": "MI to weights: 'softmax' or 'power'."}
    )
    bdpo_balance: bool = field(
        default=_DEFAULT.balance, metadata={"help": "Use the balance weights (BW)."}
    )
    bdpo_scaling: bool = field(
        default=_DEFAULT.scaling, metadata={"help": "Use the scaling factor (SF)."}
    )
    bdpo_mi_estimator: str = field(
        default=_DEFAULT.mi_estimator, metadata={"help": "'pointwise' or 'expected'."}
    )
    bdpo_mi_normalize: bool = field(
        default=_DEFAULT.mi_normalize, metadata={"help": "Mutual information in nats per token."}
    )
    bdpo_null_prompt: str | None = field(
        default=_DEFAULT.null_prompt, metadata={"help": "The query-free prompt; default: derived."}
    )
    bdpo_precompute: bool = field(
        default=_DEFAULT.precompute,
        metadata={"help": "Score the whole dataset before training, not each batch in its step."},
    )
    bdpo_score_tokens: int | None = field(
        default=_DEFAULT.score_tokens,
        metadata={"help": "Most tokens of one scoring batch; default: by the free memory."},
    )
    bdpo_cache_dir: str | None = field(
        default=_DEFAULT.cache_dir, metadata={"help": "Where computed scores are kept."}
    )
    bdpo_control: str | None = field(
        default=_DEFAULT.control,
        metadata={"help": "Not B-DPO but its control: 'shuffled', 'swapped' or 'random'."},
    )


@dataclass
class BDPOConfig(BDPOArguments, DPOConfig):
    """`trl.DPOConfig` with the ``bdpo_*`` fields. The meaning of TRL's own fields is unchanged.

    Raises:
        BDPOError: a ``bdpo_*`` value is invalid.
    """

    def __post_init__(self) -> None:
        # Store the validated values, so that saved arguments contain no Path and no numpy objects.
        for key, value in BDPOSettings.from_keys(vars(self)).to_keys().items():
            setattr(self, key, value)
        super().__post_init__()
