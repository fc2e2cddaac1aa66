"""Loads datasets from the hub or from files, with readable errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdpo_plugin.settings import BDPOError

if TYPE_CHECKING:
    from datasets import Dataset


def load_train(option: str, data: str, *, files: str, **source: Any) -> Dataset:
    """Loads the split ``train`` with the package `datasets`.

    Args:
        option: the option with which the user named the data, for the message.
        data: the name of a dataset on the hub, unless `source` has another ``path``.
        files: the kinds of files that can be given instead, for the message.
        source: further arguments of `load_dataset`.

    Raises:
        BDPOError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(**{"path": data, **source}, split="train")
    except Exception as error:  # the hub's client can raise anything without a network
        raise BDPOError(
            f"{option} {data} could not be loaded: {str(error).rstrip('.')}. A dataset of the hub "
            f"is wanted, and a network, or {files}."
        ) from error
