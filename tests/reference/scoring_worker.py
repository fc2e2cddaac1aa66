"""A reference pass in a process of its own, or in several under torchrun.

Usage: scoring_worker.py DIRECTORY [SECONDS]: the store is DIRECTORY/store, each forward pass
takes SECONDS more; DIRECTORY/rank{N}.pt gets what each rank saw.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import wrapped_training
from small_models import CPU, counted_rows, random_pairs, small_model

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.reference import score_pairs as dataset
from bdpo_plugin.reference import shared_store as exchange
from bdpo_plugin.reference.frozen_model import Reference
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.store import ScoreStore
from bdpo_plugin.settings import BDPOError, BDPOSettings

NULL = NullPrompt((7, 8, 9), "", "")
PAIRS = random_pairs(25, seed=5)
SETTINGS = BDPOSettings(score_tokens=48)


def environment():
    """Of the worker's process: it imports what this one can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def score(model, pairs, directory=None, settings=SETTINGS, fails_after=None):
    """The scores, or why there are none, and the number of rows of each forward pass they took.

    After so many passes the memory is too small for any sequence.
    """
    store = ScoreStore(directory, ["model", "tokenizer"]) if directory else None
    reader, reference = ResponseReader(), Reference(model, "itself")
    run = {"settings": settings, "reader": reader, "device": CPU}
    dataset.score_pairs(PAIRS[:1], reference, NULL, **run)  # the reader has met the model
    with counted_rows(model) as rows:

        def check(*_):
            if fails_after is not None and len(rows) > fails_after:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = model.register_forward_pre_hook(check)
        try:
            if store is None:
                scores = dataset.score_pairs(pairs, reference, NULL, **run)
            else:
                scores = dataset.score_dataset(
                    pairs, reference, NULL, **run, store=store, name="train"
                )
        except BDPOError as error:
            return str(error), rows
        finally:
            handle.remove()
    return scores, rows


def main():
    directory, pause = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0
    exchange._FLUSH_SECONDS = 0.2
    model = small_model(build_tokenizer())
    model.register_forward_hook(lambda *_: time.sleep(pause))
    rank, world = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    seen = {"first": score(model, PAIRS, directory / "store")}
    seen["again"] = score(model, PAIRS, directory / "store")
    # in a training step every rank has a batch of its own, of any size
    mine = PAIRS[: 5 + 3 * rank]
    seen["own"] = score(model, mine)
    seen["expected"] = score(
        model, PAIRS[:7], directory / "store", BDPOSettings(mi_estimator="expected")
    )
    if world > 1:
        seen["other order"] = score(
            model, [PAIRS[0], *(PAIRS[1:4] if rank else PAIRS[3:0:-1])], directory / "different"
        )
        seen["fewer"] = score(model, PAIRS[: 9 - rank], directory / "different")
        for passes in (0, 4):
            seen[f"fails after {passes}"] = score(
                model,
                PAIRS,
                directory / f"fails{passes}",
                fails_after=passes if rank == 1 else None,
            )
        # the scores of one model, and then another one that is taken for it
        score(small_model(build_tokenizer(), seed=1), PAIRS, directory / "mistaken")
        seen["mistaken"] = score(model, PAIRS, directory / "mistaken")
        sharded = wrapped_training.wrapped(small_model(build_tokenizer()), "FSDP2")
        seen["mistaken, sharded"] = [
            score(one, PAIRS[:6], directory / "sharded")
            for one in (small_model(build_tokenizer(), seed=1), sharded, sharded)
        ][1:]
        for wrapper in ("FSDP1", "FSDP2"):
            sharded = wrapped_training.wrapped(small_model(build_tokenizer()), wrapper)
            seen[f"own, {wrapper}"] = score(sharded, mine)
        seen["losses"] = {
            case: (
                wrapped_training.losses(case, ours=True),
                wrapped_training.losses(case, ours=False),
            )
            for case in wrapped_training.CASES
        }
        dist.destroy_process_group()
    torch.save({"world": world, **seen}, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
