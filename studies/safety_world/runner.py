"""Runs all that is not yet there, in one or two processes, and keeps each result as a file."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from studies.pool import finished
from studies.safety_world.pretrain import source_digest
from studies.safety_world.versions import package_digest

#: What a result depends on, beside the package.
_SOURCES = ("words", "world", "pretrain", "data", "evaluate", "information", "train", "weighting")


#: Jobs of one pool of processes.
_LIFETIME = 100


class Job(NamedTuple):
    """A task by name (see :func:`perform`) and its arguments, as JSON."""

    task: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task} " + " ".join(
            str(v) for k, v in self.arguments.items() if k in ("seed", "method", "data")
        )

    def file(self, work: Path) -> Path:
        """Where its result is kept: named by content, so that a change of code runs it again."""
        versions = [package_digest(), version("trl")]
        text = json.dumps([self, source_digest(*_SOURCES), versions], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return work / "runs" / f"{self.name.replace(' ', '-').replace(':', '-')}-{digest}.json"


def perform(job: Job, work: Path) -> dict[str, Any]:
    """One job, in this process."""
    from studies.safety_world import pretrain, train

    if job.task == "pretrain":
        arguments = dict(job.arguments)
        pretrain.pretrained(arguments.pop("seed"), work / "models", **arguments)
        return {}
    if job.task == "survey":
        return train.look(work=work, **job.arguments)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in job.arguments.items()}
    return train.run(train.Spec(**arguments), work)


def keep(job: Job, work: Path, file: Path) -> str | None:
    """Perform a job and write its result to `file`; the traceback if it fails.

    The file is named before the job begins, so that code edited meanwhile does not sign for it.
    """
    try:
        result = perform(job, work)
    except Exception:
        return traceback.format_exc()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"job": job, "result": result}, indent=1))
    temporary.replace(file)
    return None


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_all(stages: Iterable[Iterable[Job]], work: Path, *, processes: int = 2) -> dict[str, str]:
    """Perform the jobs that have no result yet, each stage after the one before.

    Returns:
        name -> traceback of the jobs that failed; the next call tries them again.
    """
    failed: dict[str, str] = {}
    todo = [
        [job for job in {json.dumps(j): j for j in stage}.values() if not job.file(work).exists()]
        for stage in stages
    ]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for number, jobs in enumerate(todo, 1):
            task = bar.add_task(f"stage {number} of {len(todo)}", total=len(jobs))
            calls = ((job, work, job.file(work)) for job in jobs)
            ended = finished(
                keep, calls, processes=processes, lifetime=_LIFETIME, begin=_single_thread
            )
            for (job, *_), future in ended:
                lost = future.exception()
                if problem := repr(lost) if lost else future.result():
                    failed[job.file(work).stem] = problem
                    text = escape(problem[-600:])
                    bar.console.print(f"[red]FAILED[/] {job.name}\n{text}")
                bar.update(task, advance=1, description=f"stage {number}: {job.name}")
    return failed


def train_job(spec: Any) -> Job:
    return Job("train", json.loads(json.dumps(asdict(spec))))


def result(job: Job, work: Path) -> dict[str, Any] | None:
    """The result of a finished job, or None."""
    file = job.file(work)
    return json.loads(file.read_text())["result"] if file.exists() else None
