"""Checks for TRL's options that B-DPO cannot honour, before anything is computed."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable
from typing import Any

import trl
from trl import DPOConfig, DPOTrainer

from bdpo_plugin.limits import Limit, check_limits, check_loss
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.model_files import check_decoder, check_model

#: Arguments of `trl.DPOConfig` that must keep their defaults.
_LIMITS = (
    Limit("use_weighting", "WPO weights would be multiplied onto the balance weights"),
    Limit("padding_free", "TRL itself has it switched off"),
    Limit("f_divergence_type", "the balance weights are defined on log-ratios", ("reverse_kl",)),
    Limit("ld_alpha", "it would weight the tokens that the mutual information is of", (1,)),
    Limit("sync_ref_model", "the reference that the scores come from has to stay frozen"),
    Limit("precompute_ref_batch_size", "`bdpo_score_tokens` sets the size of a scoring batch", ()),
)
_FUSED = Limit("use_liger_kernel", "Liger's fused DPO loss knows no balance weights")
#: For the sizes in accelerate's `ParallelismConfig`.
_WHOLE = "the reference pass needs whole sequences, and different rows in each rank"
_SPLITS = tuple(
    Limit(key, _WHOLE, (1,), "Set it to 1.") for key in ("tp_size", "cp_size", "sp_size")
)

#: Releases of TRL that the tests run with.
TESTED = ("1.9.0", "1.16.0")
#: Methods of `trl.DPOTrainer` that BDPOTrainer overrides -> the arguments that TRL passes to them.
_METHODS: dict[str, tuple[str, ...]] = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "_set_signature_columns_if_needed": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "log": ("logs", "start_time"),
}


def check_release(trainer: type, found: str) -> None:
    """Checks that TRL's trainer has the methods that BDPOTrainer overrides or calls.

    Warns if it has, but the tests do not run with this release.

    Args:
        trainer: TRL's `DPOTrainer`.
        found: the installed release of TRL.

    Raises:
        BDPOError: methods are missing. The message lists them and the tested releases.
    """
    missing = [
        f"the method {name}({', '.join(arguments)})"
        for name, arguments in _METHODS.items()
        if not _takes(getattr(trainer, name, None), arguments)
    ]
    if missing:
        raise BDPOError(
            f"B-DPO cannot run beside TRL {found}, whose DPOTrainer lacks {'; '.join(missing)}. "
            f"Install one of the tested releases: {', '.join(TESTED)}."
        )
    if found not in TESTED:
        warnings.warn(
            f"bdpo-plugin is tested with TRL {' and '.join(TESTED)}; this is {found}.",
            stacklevel=4,
        )


def _takes(method: Any, arguments: tuple[str, ...]) -> bool:
    """Whether a method takes these arguments in this order and requires no others."""
    if method is None:
        return False
    own = list(inspect.signature(method).parameters.values())[1:]
    rest = own[len(arguments) :]
    return [p.name for p in own[: len(arguments)]] == list(arguments) and all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in rest
    )


def check_arguments(args: Any) -> BDPOSettings:
    """Returns the settings of a run, after checking its arguments.

    Raises:
        BDPOError: a ``bdpo_*`` value is invalid, an argument cannot be honoured, or the trainer
            cannot run with this release of TRL. The message names the argument.
    """
    if not isinstance(args, DPOConfig) or not hasattr(args, "bdpo_alpha"):
        raise BDPOError(
            f"BDPOTrainer needs `args` to be a bdpo_plugin.BDPOConfig, got {type(args).__name__}."
        )
    check_release(DPOTrainer, trl.__version__)
    settings = BDPOSettings.from_keys(vars(args))
    check_loss(
        args.loss_type,
        args.label_smoothing,
        type_key="loss_type",
        smoothing_key="label_smoothing",
    )
    # some releases of TRL have enums here
    values = {key: getattr(value, "value", value) for key, value in vars(args).items()}
    # releases without Liger's fused DPO loss apply Liger's kernels to the layers only
    fused = hasattr(DPOTrainer, "_compute_loss_liger")
    check_limits(values, (*_LIMITS, *([_FUSED] if fused else [])), "B-DPO")
    settings.check_precompute(args.precompute_ref_log_probs or None)  # False is TRL's default
    return settings


def check_columns(arguments: Iterable[Any]) -> None:
    """Checks that no dataset among the arguments of a trainer has images.

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


def check_given_model(model: Any, args: DPOConfig) -> None:
    """Checks that a model exists and that it has no encoder.

    Args:
        model: the trainer's argument: a loaded model, or its name.
        args: the arguments of the run.
    """
    if isinstance(model, str | os.PathLike):
        options = args.model_init_kwargs or {}
        hub = {key: options.get(key) for key in ("revision", "token", "cache_dir")}
        check_model("model", os.fspath(model), **hub)
    elif (config := getattr(model, "config", None)) is not None:
        check_decoder(config, f"The model, a {type(model).__name__},")


def check_launch(accelerator: Any, gpus: int) -> None:
    """Checks that batches reach each process whole.

    Raises:
        BDPOError: one process has several GPUs, or a sequence or layer is split over ranks.
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
