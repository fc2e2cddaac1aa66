"""What of TRL's configuration B-DPO cannot honour, refused before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import trl
from trl import DPOConfig

from bdpo_plugin.refusals import Limit, check_limits
from bdpo_plugin.settings import BDPOError, BDPOSettings, check_loss

#: Arguments of `trl.DPOConfig`, and why they must stay as they are.
_LIMITS = (
    Limit("use_weighting", "WPO weights would be multiplied onto the balance weights"),
    Limit("use_liger_kernel", "Liger's fused DPO loss knows no balance weights"),
    Limit("padding_free", "TRL itself has it switched off"),
    Limit("f_divergence_type", "the balance weights are defined on log-ratios", ("reverse_kl",)),
    Limit("ld_alpha", "it would weight the tokens that the mutual information is of", ()),
    Limit("sync_ref_model", "the reference that the scores come from has to stay frozen"),
    Limit("precompute_ref_batch_size", "`bdpo_score_tokens` sets the size of a scoring batch", ()),
)
#: Sizes of accelerate's `ParallelismConfig`.
_WHOLE = "the scoring pass wants whole sequences, and rows of its own in each rank"
_SPLITS = tuple(
    Limit(key, _WHOLE, (1,), "Set it to 1.") for key in ("tp_size", "cp_size", "sp_size")
)

#: Releases of TRL that the tests run beside.
TESTED = ("1.9.0", "1.16.0")


def check_arguments(args: Any) -> BDPOSettings:
    """The method's settings of a run, or a refusal that names the argument.

    Raises:
        BDPOError: a ``bdpo_*`` value out of range, or an argument that cannot be honoured.
    """
    if not isinstance(args, DPOConfig) or not hasattr(args, "bdpo_alpha"):
        raise BDPOError(
            f"BDPOTrainer needs `args` to be a bdpo_plugin.BDPOConfig, got {type(args).__name__}."
        )
    if trl.__version__ not in TESTED:
        warnings.warn(
            f"bdpo-plugin is tested with TRL {' and '.join(TESTED)}; this is {trl.__version__}.",
            stacklevel=3,
        )
    settings = BDPOSettings.from_keys(vars(args))
    check_loss(
        args.loss_type,
        args.label_smoothing,
        type_key="loss_type",
        smoothing_key="label_smoothing",
    )
    # enums in some releases of TRL
    values = {key: getattr(value, "value", value) for key, value in vars(args).items()}
    check_limits(values, _LIMITS, "B-DPO")
    settings.check_precompute(args.precompute_ref_log_probs or None)  # False is TRL's default
    return settings


def check_columns(arguments: Iterable[Any]) -> None:
    """Refuse vision data among the arguments of a trainer.

    Raises:
        BDPOError: a dataset has an image column.
    """
    for value in arguments:
        for dataset in value.values() if isinstance(value, dict) else [value]:
            images = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
            if images:
                raise BDPOError(
                    "B-DPO cannot train on a vision dataset: it measures the mutual information "
                    f"of text with text. Remove the column {', '.join(sorted(images))}."
                )


def check_launch(accelerator: Any, gpus: int) -> None:
    """Refuse a way of using several GPUs that a preference batch cannot be read under.

    Raises:
        BDPOError: one process with several GPUs, or a sequence or layer split over ranks.
    """
    if gpus > 1:
        raise BDPOError(
            f"One process has {gpus} GPUs, which torch.nn.DataParallel would split each batch "
            "over. Start one process for each GPU with `torchrun` or `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    check_limits(
        {limit.key: getattr(parallel, limit.key, None) for limit in _SPLITS}, _SPLITS, "B-DPO"
    )
