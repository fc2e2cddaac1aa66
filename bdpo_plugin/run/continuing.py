"""What a checkpoint says of the run that wrote it, and what keeps two runs apart."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from bdpo_plugin.settings import BDPOError

#: Beside the weights in every folder that a run saves them to.
FILE = "bdpo_run.json"


def write_description(folder: str | Path, description: Mapping[str, Any]) -> None:
    """Say in a folder of saved weights what they were trained on and with."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def check_checkpoint(
    checkpoint: str | Path, description: Mapping[str, Any], *, optimizer: bool = True
) -> None:
    """Refuse a checkpoint that this run could not continue exactly.

    Args:
        checkpoint: the folder.
        description: of this run, as :func:`write_description` writes it. An entry of None, here
            or there, is not known and not compared.
        optimizer: whether the host keeps the optimizer's state in a file of the folder.

    Raises:
        BDPOError: it is not whole, not of a B-DPO run, or of a run that differs.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise BDPOError(f"There is no checkpoint {folder} to continue from.")

    def refusal(why: str) -> BDPOError:
        return BDPOError(
            f"The checkpoint {folder} cannot be continued: {why}. Resume from another one "
            "(delete this one where the host picks the last), or begin anew in another folder."
        )

    if not (folder / "trainer_state.json").is_file():
        raise refusal("it has no trainer_state.json, as when a run is killed while it saves")
    if optimizer and not any((folder / f"optimizer.{end}").is_file() for end in ("pt", "bin")):
        raise refusal("it has no state of the optimizer (was `save_only_model` on?)")
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(f"it has no {FILE}, so it was not written by a B-DPO run") from None
    except (OSError, ValueError) as error:
        raise refusal(f"its {FILE} cannot be read ({error})") from error
    if changed := list(_changes(before, json.loads(json.dumps(description)))):
        raise refusal(f"it was written by a run that differs in {'; '.join(changed)}")


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), key)
    elif before is not None and now is not None and before != now:
        yield f"`{name}`: {before} there, {now} here"


class OutputFolder:
    """An output folder that only the trainers of this process write to, as long as this lives.

    The operating system lets go of the lock when the process ends, however it ends. Where it has
    no such locks (Windows, some network file systems), there is none.

    Raises:
        BDPOError: a trainer of another process has the folder.
    """

    _of_process: ClassVar[WeakValueDictionary[Path, OutputFolder]] = WeakValueDictionary()

    @classmethod
    def take(cls, path: str | Path) -> OutputFolder:
        """The folder, which several trainers of one process may have."""
        folder = Path(path).resolve()
        return cls._of_process.get(folder) or cls._of_process.setdefault(folder, cls(folder))

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ".bdpo.lock").open("a+")
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            raise BDPOError(
                f"Another B-DPO run has the output folder {folder} ({self._file.read().strip()}): "
                "their checkpoints would overwrite each other. Give this run a folder of its own, "
                "or end the other one."
            ) from error
        except (ImportError, OSError):
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
