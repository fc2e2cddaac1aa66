"""The runs of one process: model and data are read once."""

from __future__ import annotations

import gc
import os
import traceback
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from studies.real_models.design import Job, Preset, Where

if TYPE_CHECKING:
    from studies.real_models.train import Bench


def perform(job: Job, where: Where) -> tuple[dict[str, Any], str]:
    """The record of a job, or an error, in a worker."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        found = _bench(job.preset, where).run(job)
    except Exception:  # whatever it is, the other runs go on
        return {}, traceback.format_exc()
    gc.collect()  # a trainer is a circle, with a model in it
    from studies.safety_world.versions import package_digest

    about = {
        "package": package_digest(),
        "arm": job.arm,
        "seed": job.seed,
        "settings": job.settings,
    }
    training = vars(job.preset.training)
    return about | {"training": training, "dtype": job.preset.dtype, **found}, ""


@lru_cache(maxsize=1)
def _bench(preset: Preset, where: Where) -> Bench:
    from studies.real_models.train import Bench

    return Bench(preset, where)
