"""python -m soak.hosts: all rows of the hosts that are installed, and a table of them.

What a row has given is kept in the folder of `--work` until its lines in the YAML, the package or
the host change: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from benchmarks.runs import QUIET, ROOT, console, progress
from soak.hosts.judge import TOLERANCES, Verdict, judge
from soak.hosts.rows import METHODS, Row, load
from soak.hosts.run import HOSTS
from soak.hosts.runner import Runner

_ENVIRONMENT = {
    **QUIET,
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",  # Liger's kernels run on the CPU, slowly
}


class Kept:
    """What the two runs of a row gave, in the folder of the work."""

    def __init__(self, row: Row, work: Path) -> None:
        self.row = row
        self.folder = work / "rows" / row.of / row.name

    def file(self, method: str) -> Path:
        return self.folder / method / "kept.json"

    def result(self, method: str) -> dict[str, Any] | None:
        """None where there is none of this row, this package and these hosts."""
        if not (file := self.file(method)).exists():
            return None
        kept = json.loads(file.read_text())
        return kept["result"] if kept["digest"] == self.digest(method) else None

    def keep(self, method: str, result: dict[str, Any]) -> None:
        content = {"digest": self.digest(method), "result": result}
        self.file(method).write_text(json.dumps(content))

    def digest(self, method: str) -> str:
        """Of all that the result depends on."""
        folder = Path(__file__).parent
        files = [folder / "run.py", folder / "material.py"]
        if method == "bdpo":
            files += sorted((ROOT / "bdpo_plugin").rglob("*.py"))
        config = self.row.config(method, Path("material"), Path("folder"))
        content = hashlib.sha256(repr(config).encode())
        for file in files:
            content.update(file.read_bytes())
        return content.hexdigest()

    def verdict(self) -> Verdict | None:
        results = [self.result(method) for method in METHODS[self.row.of]]
        return None if None in results else judge(self.row, *results)


def _server(host: str) -> Any:
    os.environ.update(_ENVIRONMENT)
    sys.path.append(str(ROOT / "tests"))
    from warm import Server  # with that environment

    return Server(*HOSTS[host][1])


def table(rows: list[tuple[Row, Verdict]]) -> Table:
    """A line for each row."""
    made = Table(title="The host's own DPO and B-DPO with bdpo_alpha: 0", title_justify="left")
    for name in ("host", "row", "computes in", "loss", "rewards", "rest", "", "what came of it"):
        made.add_column(name)
    for row, verdict in rows:
        numbers = (verdict.loss, verdict.reward, verdict.rest)
        made.add_row(
            row.of,
            row.name,
            row.dtype,
            *("" if number is None else f"{number:.0e}" for number in numbers),
            "holds" if verdict.holds else "[bold red]fails[/]",
            escape(verdict.words),
        )
    return made


def markdown(rows: list[tuple[Row, Verdict]]) -> str:
    """The same for the documentation, after a summary by host and by what the rows compute in."""
    lines = ["| host | computes in | rows | losses | rewards | rest |", "|" + " --- |" * 6]
    trained = [(row, verdict) for row, verdict in rows if verdict.loss is not None]
    for host, dtype in dict.fromkeys((row.of, row.dtype) for row, _ in trained):
        of = [verdict for row, verdict in trained if (row.of, row.dtype) == (host, dtype)]
        worst = (max(getattr(v, name) for v in of) for name in ("loss", "reward", "rest"))
        numbers = " | ".join(f"{number:.0e}" for number in worst)
        lines.append(f"| {host} | {dtype} | {len(of)} | {numbers} |")
    lines += ["", "| host | row | computes in | losses | rewards | rest | |", "|" + " --- |" * 7]
    for row, verdict in rows:
        numbers = (verdict.loss, verdict.reward, verdict.rest)
        cells = " | ".join("" if number is None else f"{number:.0e}" for number in numbers)
        words = verdict.words if verdict.holds else f"**{verdict.words}**"
        lines.append(f"| {row.of} | {row.name} | {row.dtype} | {cells} | {words} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--host", type=click.Choice(list(HOSTS)), help="Default: all that are installed.")
@click.option("--row", "names", multiple=True, help="Only these rows; may be given more than once.")
@click.option("--quick", is_flag=True, help="Only the rows of `make test`.")
@click.option("--again", is_flag=True, help="Run what has been run before too.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("soak/hosts"))
def main(host: str | None, names: tuple[str, ...], quick: bool, again: bool, work: Path) -> None:
    done: list[tuple[Row, Verdict]] = []
    for name in [host] if host else HOSTS:
        rows = [r for r in load(name) if (not names or r.name in names) and (r.quick or not quick)]
        if find_spec(name):
            run_rows(name, rows, work.absolute(), again)
        elif (python := ROOT / f".venv-{name}" / "bin" / "python").exists():
            options = [f"--row={row.name}" for row in rows] + ["--again"] * again
            command = [python, "-m", __package__, f"--host={name}", f"--work={work}", *options]
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        found = [(row, Kept(row, work).verdict()) for row in rows]
        done += [(row, verdict) for row, verdict in found if verdict]
    shown = console()
    shown.print(table(done))
    for dtype, (near, nearly) in TOLERANCES.items():
        shown.print(f"{dtype}: losses and rewards within {near:g}, the rest within {nearly:g}")
    failed = [row.name for row, verdict in done if not verdict.holds]
    shown.print(f"{len(done) - len(failed)} of {len(done)} rows hold")
    (work / "table.md").write_text(markdown(done))
    sys.exit(bool(failed))


def run_rows(host: str, rows: list[Row], work: Path, again: bool) -> None:
    """Run what has not been run, and keep what comes of it."""
    todo = [
        (kept, method)
        for kept in (Kept(row, work) for row in rows)
        for method in METHODS[host]
        if again or kept.result(method) is None
    ]
    if not todo:
        return
    work.mkdir(parents=True, exist_ok=True)
    runner = Runner(host, work / "material", _server(host))
    with progress(len(todo)) as show:
        for kept, method in todo:
            show(f"{host}: {kept.row.name}, {method}")
            kept.keep(method, runner.run(kept.row, method, kept.folder / method))


if __name__ == "__main__":
    main()
