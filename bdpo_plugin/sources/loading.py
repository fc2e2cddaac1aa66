"""Datasets of the hub, or files of its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdpo_plugin.settings import BDPOError

if TYPE_CHECKING:
    from datasets import Dataset


def load_train(option: str, data: str, *, files: str, **source: Any) -> Dataset:
    """The split ``train``, by `datasets`.

    Args:
        option: by which the user named the data, for the message.
        data: a dataset of the hub, unless `source` has another ``path``.
        files: the other forms that would do, for the message.
        source: further arguments of `load_dataset`.

    Raises:
        BDPOError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(**{"path": data, **source}, split="train")
    except Exception as error:  # without a network the hub's client raises what it likes
        raise BDPOError(
            f"{option} {data} could not be loaded: {str(error).rstrip('.')}. A dataset of the hub "
            f"is wanted, and a network, or {files}."
        ) from error
