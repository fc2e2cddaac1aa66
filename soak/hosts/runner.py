"""Runs the configurations of one host, forked from a process that has imported it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from soak.hosts.rows import Row

_SECONDS = 300
_HERE = Path(__file__).parent
#: What material.py makes last.
_LAST = "model_snr_results"


class Runner:
    """Makes the material that the rows need, and runs rows.

    Args:
        host: a name of :data:`~soak.hosts.run.HOSTS`.
        folder: of the material, made if it does not exist.
        server: of tests/warm.py, in the environment of the host.
    """

    def __init__(self, host: str, folder: Path, server: Any) -> None:
        self.host = host
        self.material = folder
        self.server = server
        if not (folder / _LAST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            if self._call([_HERE / "material.py", folder], folder / "material.log"):
                raise RuntimeError((folder / "material.log").read_text())

    def run(self, row: Row, method: str, folder: Path) -> dict[str, Any]:
        """The result of one of a row's two runs; see run.py."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config, result = folder / "config.yml", folder / "result.json"
        content = row.config(method, self.material, folder)
        config.write_text(yaml.safe_dump(content, sort_keys=False))
        ended = self._call([_HERE / "run.py", self.host, config, result], folder / "output.log")
        if result.exists():
            return json.loads(result.read_text())
        return {"refused": f"the process ended with {ended}"}

    def _call(self, command: list[Any], log: Path) -> int | None:
        environment = os.environ | {"XDG_CACHE_HOME": str(log.parent / "cache")}
        with log.open("w") as output:
            process = self.server.start(
                ["python", *command], stdout=output, env=environment, cwd=self.material
            )
            try:
                return process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()  # nothing, if it has ended
