"""Commands of this environment in warm processes: forked from one that has done their imports.

Most of a short run of a host is the import of torch and of the host itself, some 5 to 10 seconds of
a processor. A :class:`Server` pays them once: it imports what it is told to, runs nothing, and
forks for each command. The fork runs the very command (the console script's file, `python -m`,
`python -c`, `python FILE`) as ``__main__``, with the arguments, the environment and the folder
of the caller, and ends as any interpreter does, with the same exit status.

What differs from a cold process:

- The modules that were preloaded are there before the command's first line, in the server's order,
  and what they read from the environment at import is what it was when the server was made.
  A test of import order, or of a variable of :data:`AT_IMPORT`, needs a cold process; another value
  of such a variable is refused.
- What the command starts itself (`accelerate launch`, `torchrun`) is cold. The processes of
  :meth:`Server.ranks` are warm, and have no `torchrun` above them.
- The garbage collector does not look at what the imports left (`gc.freeze`).
- The hash seed, and the caches that the Hugging Face libraries chose at import, are shared by all
  commands of one server. The random states are not: Python's, NumPy's and torch's are as in a new
  process.
- Its parent is the server. It leads a process group of its own, as with ``start_new_session=True``.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

#: Beginnings of the names of variables that packages read when they are imported.
AT_IMPORT = (
    "BDPO_AUTOLOAD",
    "DS_",
    "HF_",
    "OMP_",
    "PYTHON",
    "TORCH_",
    "TRANSFORMERS_",
)
_LENGTH = 8  # bytes of a request's length, before it


@cache
def server(*preload: str) -> Server:
    """The one server of this process with these modules; it ends with the process."""
    return Server(*preload)


class Process:
    """A command that was started; much of what `subprocess.Popen` has."""

    def __init__(self, args: list[str], status: socket.socket) -> None:
        self.args = args
        self.returncode: int | None = None
        self._status = status.makefile("r")
        self.pid = int(self._line())

    def _line(self) -> str:
        line = self._status.readline()
        if not line:
            raise RuntimeError(f"The server of {self.args} has died.")
        return line

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """The same once it has ended; raises `subprocess.TimeoutExpired` after so many seconds."""
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and to all that it has started in its process group."""
        if self.poll() is None:
            os.killpg(self.pid, number)


class Server:
    """A process that has imported the modules named, and forks for each command."""

    def __init__(self, *preload: str, env: dict[str, str] | None = None) -> None:
        self._env = dict(os.environ if env is None else env)
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno()), *preload]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()

    def start(
        self,
        command: list[Any],
        *,
        stdout: Any,
        env: dict[str, str] | None = None,
        cwd: Any = None,
    ) -> Process:
        """Start a command, both of whose outputs go to the open file `stdout`.

        Its first word is a Python, or the path of a script that is written in Python, such as a
        console script of this environment.
        """
        args = [str(word) for word in command]
        env = dict(os.environ if env is None else env)
        for name in sorted(env.keys() | self._env.keys()):
            if name.startswith(AT_IMPORT) and env.get(name) != self._env.get(name):
                raise ValueError(f"{name} is read at import: {args} needs a cold process.")
        request = {"args": args, "env": env, "cwd": str(cwd or os.getcwd())}
        message = json.dumps(request).encode()
        mine, its = socket.socketpair()
        with its:
            length = len(message).to_bytes(_LENGTH, "big")
            socket.send_fds(self._socket, [length], [its.fileno(), stdout.fileno()])
            self._socket.sendall(message)
        return Process(args, mine)

    def run(self, command: list[Any], **options: Any) -> subprocess.CompletedProcess:
        """Start a command and wait for it."""
        return subprocess.CompletedProcess(command, self.start(command, **options).wait())

    def ranks(self, count: int, command: list[Any], *, env: dict[str, str], **options: Any):
        """Start a command `count` times, as `torchrun --standalone` does: the processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "warm",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }
        return [
            self.start(command, env={**env, **shared, "RANK": r, "LOCAL_RANK": r}, **options)
            for r in map(str, range(count))
        ]

    def close(self) -> None:
        """Let the server end. Commands that still run go on, as those of a shell do."""
        self._socket.close()
        self._process.wait()


# The server's process ---------------------------------------------------------------------------


def serve(control: socket.socket) -> list[str]:
    """Fork for each request until there are no more; returns in the forks only: the command."""
    running: dict[int, socket.socket] = {}
    while True:
        # the ends of processes are looked for now and then, which any system can do
        if select.select([control], [], [], 0.05 if running else None)[0]:
            length, fds, *_ = socket.recv_fds(control, _LENGTH, 2)
            if not length:
                os._exit(0)
            size = int.from_bytes(length, "big")
            request = json.loads(control.recv(size, socket.MSG_WAITALL))
            status, output = socket.socket(fileno=fds[0]), fds[1]
            pid = os.fork()
            if pid == 0:
                for inherited in (control, status, *running.values()):
                    inherited.close()
                return _become(request, output)
            os.close(output)
            status.sendall(f"{pid}\n".encode())
            running[pid] = status
        while running:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with running.pop(pid) as status:
                status.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())


def _become(request: dict[str, Any], output: int) -> list[str]:
    """Make this fork the process that was asked for, but for running the command."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # from the system's entropy, as at import; Python's own is seeded anew by the fork
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    return request["args"]


def run(args: list[str]) -> None:
    """Run a command line as `__main__` of this process."""
    import runpy

    program = Path(args[0])
    if not program.name.startswith("python"):
        args = ["python", *args]
    kind, *rest = args[1:]
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = [kind, *rest], str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _control = socket.socket(fileno=int(sys.argv[1]))
    for _name in sys.argv[2:]:
        import_module(_name)
    # Axolotl collects garbage at every step: not through all that has been imported
    gc.collect()
    gc.freeze()
    sys.stdout.flush()  # or every fork would write what is in the buffer
    run(serve(_control))
