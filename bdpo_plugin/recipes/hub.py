"""Access to the Hugging Face hub, with readable errors if the network fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@contextmanager
def asking(failed: str) -> Iterator[HfApi]:
    """Context manager that yields the client of the hub.

    Args:
        failed: the beginning of the message if a request fails.

    Raises:
        click.ClickException: a request fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield HfApi()
    except Exception as error:
        # the bases of this class include the errors of the HTTP library that the client uses, which
        # is requests, httpx or httpx2
        if not isinstance(error, (OSError, *HfHubHTTPError.__bases__)):
            raise
        raise click.ClickException(f"{failed}: {error}") from error
