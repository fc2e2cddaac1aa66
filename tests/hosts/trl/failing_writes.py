"""What each process of test_two_processes.py runs where the main one cannot write a file:
python failing_writes.py OUTPUT_DIR."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch.distributed as dist
from running import pairs, trainer

from bdpo_plugin import BDPOError

#: What cannot be written, as a folder is in its place.
FILES = ("reference_scores.parquet", "run.json", "recipe.yml")


def main(output_dir: str) -> None:
    for file in FILES:
        folder = Path(output_dir, file)
        (folder / "bdpo" / file / "in the way").mkdir(parents=True, exist_ok=True)
        try:
            made = trainer(output_dir=folder, dataset=pairs(4), max_steps=1)
            made.configuration = "rl: bdpo"
            made.train()
        except BDPOError as error:
            print(f"rank {dist.get_rank()}, {file}: {error}", flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
