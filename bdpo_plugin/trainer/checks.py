"""What of TRL's configuration B-DPO cannot honour, refused before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import trl
from trl import DPOConfig

from bdpo_plugin.settings import BDPOError, BDPOSettings, check_loss_types

#: Argument of `trl.DPOConfig`, the value that B-DPO can honour, why no other.
_ONLY = (
    ("use_weighting", False, "WPO weights would be multiplied onto the balance weights"),
    ("use_liger_kernel", False, "Liger's fused DPO loss knows no balance weights"),
    ("padding_free", False, "TRL itself has it switched off"),
    ("f_divergence_type", "reverse_kl", "the balance weights are defined on log-ratios"),
    ("ld_alpha", None, "it would weight the tokens that the mutual information is measured on"),
    ("sync_ref_model", False, "the reference that the scores come from has to stay frozen"),
    ("precompute_ref_batch_size", None, "`bdpo_score_tokens` sets the size of a scoring batch"),
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
    losses = check_loss_types(args.loss_type, "loss_type")
    for name, allowed, reason in _ONLY:
        value = getattr(args, name, allowed)
        value = getattr(value, "value", value)  # an enum in some releases of TRL
        if value != allowed:
            raise BDPOError(
                f"`{name}: {value}` cannot be used with B-DPO: {reason}. Set it to {allowed!r} or "
                "leave it out."
            )
    if args.label_smoothing and "robust" not in losses:
        raise BDPOError(
            f"`label_smoothing: {args.label_smoothing}` has no effect on the loss types {losses}: "
            "use the loss type 'robust', or leave it out."
        )
    if "robust" in losses and not 0 <= args.label_smoothing < 0.5:
        raise BDPOError(
            f"`label_smoothing: {args.label_smoothing}` must lie in [0, 0.5) for the 'robust' loss."
        )
    if args.precompute_ref_log_probs and not settings.precompute:
        raise BDPOError(
            "`precompute_ref_log_probs: true` contradicts `bdpo_precompute: false`: B-DPO computes "
            "both log-probabilities and MI in one pass. Set bdpo_precompute alone."
        )
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
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise BDPOError(
                f"`{name}: {size}` cannot be used with B-DPO: the scoring pass wants whole "
                "sequences, and rows of its own in each rank."
            )
