"""What the tests of every host's real runs share; it imports no host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bdpo_plugin.demo.tiny import write


def make_tiny(directory: Path) -> Path:
    """The tiny model with weights that give a mutual information as large as a trained one's."""
    write(directory, steps=0, train_pairs=32, eval_pairs=8, progress=False)
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.save_pretrained(directory / "model")
    return directory


def run_command(
    command: list[str], environment: dict[str, str], server: warm.Server | None = None
) -> subprocess.CompletedProcess:
    """Run a command of this environment, warm if there is a server; its output is `stdout`."""
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    environment = {**os.environ, "PATH": path, "COLUMNS": "200", **environment}
    with tempfile.TemporaryFile("w+") as output:
        if server:
            process = server.start(command, env=environment, stdout=output)
        else:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            process.wait(600)
        finally:
            process.kill()  # nothing, if it has ended
        output.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, output.read())
    if done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout[-6000:]}")
    return done


def run_ranks(server: warm.Server, count: int, command: list[Any]) -> str:
    """Run a command in `count` warm processes that are ranks of one run; the output of all."""
    with tempfile.TemporaryFile("w+") as output:
        ranks = server.ranks(count, command, env=dict(os.environ), stdout=output)
        end = time.monotonic() + 600
        try:
            # the others may wait for one that failed
            while not any(rank.poll() for rank in ranks) and time.monotonic() < end:
                if all(rank.poll() == 0 for rank in ranks):
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
        output.seek(0)
        shown = output.read()
    if any(rank.wait() for rank in ranks):
        raise AssertionError(f"{count} ranks of {command} failed:\n{shown[-6000:]}")
    return shown


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The adapter or the model that a run saved."""
    file = directory / "adapter_model.safetensors"
    return load_file(file if file.exists() else directory / "model.safetensors")


def mean_log_probability(model, tokenizer, rows: Path, end: str) -> float:
    """Of the chosen responses of a file of the tiny data, in nats; each ends with `end`."""
    total = 0.0
    lines = rows.read_text().splitlines()
    for row in map(json.loads, lines):
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, tokenize=False
        )
        before, response = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, row["chosen"]["content"] + end)
        )
        with torch.no_grad():
            logits = model(torch.tensor([before + response])).logits[0, len(before) - 1 : -1]
        chosen = torch.tensor(response)[:, None]
        total += logits.float().log_softmax(-1).gather(1, chosen).sum().item()
    return total / len(lines)


def as_function(model):
    """The model in float64 as tests/truth.py wants one."""
    model = model.double().eval()

    def logits(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)])).logits[0].numpy().astype(np.float64)

    return logits
