"""The hub, asked over a network that may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@contextmanager
def asking(failed: str) -> Iterator[HfApi]:
    """The hub's interface.

    Args:
        failed: what is told before the reason, where the hub does not do what it is asked for.

    Raises:
        click.ClickException: it does not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    errors: list[type[Exception]] = [OfflineModeIsEnabled, OSError]
    try:
        from httpx import HTTPError
    except ImportError:
        pass  # before its release 1.0 the hub's client goes by requests, whose errors are OSErrors
    else:
        errors.append(HTTPError)
    try:
        yield HfApi()
    except tuple(errors) as error:
        raise click.ClickException(f"{failed}: {error}") from error
