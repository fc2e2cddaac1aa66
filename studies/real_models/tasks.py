"""The paper's general benchmarks by lm-eval, where it is installed and has them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: What the paper evaluates by, beside StrongREJECT's and XSTest's prompts -> the task of lm-eval.
PAPER = {"GSM8K": "gsm8k", "AdvGLUE": "adv_glue", "SimpleQA": "simpleqa"}
#: What nothing here measures: each needs an optimiser or a second model of its own.
ATTACKS = ("GCG", "PAIR")


def missing() -> dict[str, str]:
    """Each evaluation of the paper that cannot be made here -> why."""
    found = dict.fromkeys(ATTACKS, "attacks are not part of this command")
    if not find_spec("lm_eval"):
        return found | dict.fromkeys(PAPER, "lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    there = set(TaskManager().all_tasks)
    absent = [name for name, task in PAPER.items() if task not in there]
    return found | dict.fromkeys(absent, "this lm-eval has no such task")


def score(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, include: Path | None
) -> dict[str, list[float]]:
    """Of each task, named with its first metric, the value of each document.

    Args:
        include: a folder with further tasks.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    evaluated = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=list(tasks),
        limit=limit,
        task_manager=TaskManager(include_path=str(include) if include else None),
        bootstrap_iters=0,
    )
    found = {}
    for task, documents in evaluated["samples"].items():
        metric = documents[0]["metrics"][0]
        found[f"{task} {metric}"] = [float(document[metric]) for document in documents]
    return found
