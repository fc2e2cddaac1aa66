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
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield HfApi()
    except Exception as error:
        # the bases name the errors of the library that the client goes by: requests, httpx, httpx2
        if not isinstance(error, (OSError, *HfHubHTTPError.__bases__)):
            raise
        raise click.ClickException(f"{failed}: {error}") from error
