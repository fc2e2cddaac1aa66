"""The results of all jobs in one compressed file, of which the tables are made."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bdpo_plugin.atomic import written_whole
from studies.safety_world.runner import Job, result
from studies.safety_world.versions import package_digest

NAME = "records.jsonl.gz"


def write_records(
    stages: Iterable[Iterable[Job]], work: Path, failed: Iterable[str], file: Path
) -> None:
    """Keeps what each finished job found; a job that two experiments share once.

    Args:
        failed: the names of the jobs that failed, for the tables.
    """
    jobs = {_key(job): job for stage in stages for job in stage}
    lines = [json.dumps({"package": package_digest(), "failed": sorted(failed)})]
    for job in jobs.values():
        if (found := result(job, work)) is not None:
            lines.append(json.dumps({"job": job, "result": found}))
    with written_whole(file) as temporary:
        temporary.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))


def read_records(file: Path) -> tuple[Callable[[Job], dict[str, Any] | None], list[str]]:
    """What finds the result of a job, or None, and the names of the jobs that failed."""
    head, *rows = map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines())
    found = {json.dumps(row["job"], sort_keys=True): row["result"] for row in rows}
    return lambda job: found.get(_key(job)), head["failed"]


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)
