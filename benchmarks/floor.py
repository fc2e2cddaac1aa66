"""``python -m benchmarks.floor``: the step and the pass beside the least that they have to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import evaluation
from bdpo_plugin.model.tree_attention import ARGUMENT, PrefixGroup, Tree
from bdpo_plugin.reference.batches import budgeted_batches
from bdpo_plugin.reference.scoring import ScoreRequest, score_requests
from bdpo_plugin.training.batch import PreferenceBatch
from bdpo_plugin.training.score_columns import SCORE_COLUMNS
from bdpo_plugin.training.step import LossTerms, preference_step
from benchmarks.material import build_model, build_pairs, build_tokenizer
from benchmarks.meters import Memory
from benchmarks.runs import console, json_option, make_runs, save, spread
from benchmarks.setting import FORWARDS, HOST_PART, Setting, setting_options, take_setting

#: Tokens of a batch of the pass: the default of `bdpo_score_tokens`.
_BUDGET = 4096

#: A prompt and its response, (n,) token ids each; and those of a pair, chosen and rejected.
Text = tuple[np.ndarray, np.ndarray]
Sides = list[Text]


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Times over the data, in turn.")
@click.option("--sweep", is_flag=True, help="The memory of a step by the length of its sequences.")
@json_option
@setting_options
def main(repeats: int, sweep: bool, json_file: Path | None, **options: Any) -> None:
    """Our step and our pass, beside a floor that is measured in turn with them.

    The floor of a step is a forward and a backward of the same model on the real tokens, each
    prompt once, its output layer on the response positions only, and their cross-entropy. The
    floor of the pass is a forward of the same kind. On a CPU the time is that of the processor.
    What a run has to do for its pass beside the forwards is measured in a run of its own.
    """
    setting = take_setting(options)
    results = _sweep(setting) if sweep else _beside(setting, repeats)
    save(json_file, setting=asdict(setting), results=results)


def _beside(setting: Setting, repeats: int) -> dict[str, Any]:
    with make_runs(setting) as runs:
        took = runs.parts(until_forward=False)
    fixed = {
        part: times[setting.device == "cpu"]  # of wall and processor time
        for part, times in took.items()
        if part not in (HOST_PART, FORWARDS)
    }
    model, device = build_model(setting), torch.device(setting.device)
    pairs, null = _pairs(setting)
    batches = [pairs[i : i + setting.batch] for i in range(0, len(pairs), setting.batch)]
    reader = ResponseReader()
    times: dict[str, list[float]] = {}

    def measure(name: str, function: Callable[[], Any]) -> None:
        start = _now(device)
        function()
        times.setdefault(name, []).append(_now(device) - start)

    texts = [text for pair in pairs for text in pair]
    bare = [ScoreRequest(prompt, response) for prompt, response in texts]
    passes = {
        name: (jobs, budgeted_batches(jobs, _BUDGET))
        for name, jobs in {
            "pass": bare + [ScoreRequest(null, response) for _, response in texts],
            "pass without the null prompt": bare,
        }.items()
    }

    def score(jobs: list[ScoreRequest], batches: list[list[int]]) -> None:
        with torch.no_grad(), evaluation(model):
            for _ in score_requests(model, reader, jobs, batches, device):
                pass

    def read_all(jobs: list[ScoreRequest], batches: list[list[int]]) -> None:
        with torch.no_grad(), evaluation(model):
            for batch in batches:
                _floor(model, [(jobs[i].prompt_ids, jobs[i].completion_ids) for i in batch], device)

    measure("first step, with its trials", lambda: _step(model, reader, batches[0], device))
    for _ in range(repeats):
        for name, of_pass in passes.items():
            measure(f"{name}: floor", partial(read_all, *of_pass))
            measure(f"{name}: ours", partial(score, *of_pass))
        measure("step: floor", lambda: [_train_floor(model, b, device) for b in batches])
        measure("step: ours", lambda: [_step(model, reader, b, device) for b in batches])
    table = Table(title=f"{len(pairs)} pairs, {setting.device}: seconds, median (min to max)")
    for column in ("", "floor", "ours", "ours / floor"):
        table.add_column(column)
    for name in ("step", *passes):
        floor, ours = (times[f"{name}: {kind}"] for kind in ("floor", "ours"))
        ratios = [a / b for a, b in zip(ours, floor, strict=True)]
        table.add_row(name, spread(floor), spread(ours), spread(ratios))
    rows = {"first step, with its trials": times["first step, with its trials"][0]}
    rows |= {"fixed costs of a pass": sum(fixed.values())}
    rows |= {f"  {part}": seconds for part, seconds in fixed.items() if seconds >= 0.005}
    for name, seconds in rows.items():
        table.add_row(name, "", f"{seconds:.2f}", "")
    console().print(table)
    return {**times, "fixed costs of a pass": fixed}


def _sweep(setting: Setting) -> dict[str, Any]:
    """Peak memory of a step of one pair, beyond the model, by its responses' length."""
    table = Table(title="Memory of a step of one pair [MiB]")
    table.add_column("tokens of a sequence")
    table.add_column("beyond the model")
    results = {}
    for tokens in (1024, 2048, 4096, 8192):
        length = tokens - setting.prompt
        sized = replace(setting, pairs=1, response=float(length), sigma=0.0, longest=length)
        model, device = build_model(sized), torch.device(sized.device)
        pairs, _ = _pairs(sized)
        reader = ResponseReader()
        _step(model, reader, [[(p[:8], r[:8]) for p, r in pairs[0]]], device)
        memory = Memory(sized.device)
        _step(model, reader, pairs, device)
        results[tokens] = memory.peak() - memory.loaded
        table.add_row(str(tokens), f"{results[tokens]:.0f}")
    console().print(table)
    return results


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _pairs(setting: Setting) -> tuple[list[Sides], np.ndarray]:
    """The pairs; the null prompt, which is what the prompts begin and end with."""
    tokenizer = build_tokenizer(setting.vocabulary)

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text)["input_ids"], dtype=np.int64)

    texts = build_pairs(setting)
    pairs = [
        [(ids(t["prompt"]), np.append(ids(t[side]), 1)) for side in ("chosen", "rejected")]
        for t in texts
    ]
    return pairs, np.concatenate([pairs[0][0][0][:3], pairs[0][0][0][-3:]])


def _floor(model: Any, sequences: Sequence[Text], device: torch.device) -> torch.Tensor:
    """The mean cross-entropy of the responses, those of a prompt one after another, so that each
    sees the one before it, as nothing is done to keep them apart."""
    by_prompt: dict[bytes, list[np.ndarray]] = {}
    for prompt, response in sequences:
        by_prompt.setdefault(prompt.tobytes(), [prompt]).append(response)
    texts = list(by_prompt.values())
    ids = np.concatenate([part for text in texts for part in text])
    lengths = [sum(map(len, text)) for text in texts]
    read = np.concatenate(
        [np.r_[np.zeros(len(text[0])), np.ones(sum(map(len, text[1:])))] for text in texts]
    )
    positions = torch.from_numpy(read.nonzero()[0]).to(device)
    row = torch.from_numpy(ids)[None].to(device)
    tree = Tree.of([PrefixGroup((i,)) for i in range(len(texts))], lengths, device)
    outputs = model.base_model(
        input_ids=row,
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        use_cache=False,
        **{ARGUMENT: tree},
    )
    states = outputs.last_hidden_state[0]
    logits = model.get_output_embeddings()(states[positions - 1])
    return F.cross_entropy(logits.float(), row[0, positions])


def _train_floor(model: Any, pairs: Sequence[Sides], device: torch.device) -> None:
    model.zero_grad()
    _floor(model, [sequence for pair in pairs for sequence in pair], device).backward()


def _step(model: Any, reader: ResponseReader, pairs: Sequence[Sides], device: torch.device) -> None:
    model.zero_grad()
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    width = max(len(p) + len(r) for p, r in rows)
    ids, mask, trained = torch.zeros(3, len(rows), width, dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, response]))
        mask[row, :end] = 1
        trained[row, len(prompt) : end] = 1
    ids, mask, trained = (tensor.to(device) for tensor in (ids, mask, trained))
    batch = PreferenceBatch.of(
        {"input_ids": ids, "attention_mask": mask}, trained.bool(), without=()
    )
    scores = {name: torch.ones(len(pairs), device=device) for name in SCORE_COLUMNS}
    loss, _, _ = preference_step(reader, model, batch, scores, LossTerms(["sigmoid"], [1.0], 0.1))
    loss.backward()


if __name__ == "__main__":
    main()
