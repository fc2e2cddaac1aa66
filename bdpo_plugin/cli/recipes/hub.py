"""The hub, asked over a network that may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

    errors: tuple[type[Exception], ...] = (OSError,)  # the client's own errors are such
    with suppress(ImportError):  # before its release 1.0 it goes by requests, whose errors are too
        from httpx import HTTPError

        errors += (HTTPError,)
    try:
        yield HfApi()
    except errors as error:
        raise click.ClickException(f"{failed}: {error}") from error
