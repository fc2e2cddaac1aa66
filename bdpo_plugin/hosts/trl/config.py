"""The training arguments of B-DPO: TRL's, and the keys of the method."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from bdpo_plugin.settings import BDPOSettings

_DEFAULT = BDPOSettings()


@dataclass
class BDPOArguments:
    """The ``bdpo_*`` fields alone, for a host that composes its own training arguments.

    What they mean and which values they take is in :class:`~bdpo_plugin.settings.BDPOSettings`,
    which :class:`~bdpo_plugin.hosts.trl.BDPOTrainer` validates them with.
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
    """`trl.DPOConfig` with the ``bdpo_*`` keys; beta, loss type and the rest stay TRL's.

    Raises:
        BDPOError: an ill-formed ``bdpo_*`` value.
    """

    def __post_init__(self) -> None:
        # as they are read, so that what a run saves of its arguments has no path, no numpy in it
        for key, value in BDPOSettings.from_keys(vars(self)).to_keys().items():
            setattr(self, key, value)
        super().__post_init__()
