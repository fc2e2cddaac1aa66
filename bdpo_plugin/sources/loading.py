"""Datasets of the hub, or files of its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdpo_plugin.settings import BDPOError

if TYPE_CHECKING:
    from datasets import Dataset


def load_train(data: str, *args: Any, files: str, **kwargs: Any) -> Dataset:
    """The split ``train``, by `datasets`.

    Args:
        data: what the user named.
        files: the other forms that would do, for the message.

    Raises:
        BDPOError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*args, split="train", **kwargs)
    except Exception as error:  # without a network the hub's client raises what it likes
        raise BDPOError(
            f"--data {data} could not be loaded: {str(error).rstrip('.')}. A dataset of the hub is "
            f"wanted, and a network, or {files}."
        ) from error
