"""The ten lines of Python in docs/hosts.md, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdpo_plugin.demo.tiny import write

PAGE = Path(__file__).parents[3] / "docs" / "hosts.md"


@pytest.mark.slow
def test_the_quick_start_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"hidden_size": 32, "layers": 1, "train_pairs": 4, "eval_pairs": 4}
    write(Path("bdpo-demo/tiny"), steps=0, progress=False, **options)
    section = PAGE.read_text(encoding="utf-8").split("### By ten lines of Python")[1]
    code = re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 10
    exec(compile(code, str(PAGE), "exec"), {})
    trained = load_file("out/adapter_model.safetensors")
    moved = [tensor for name, tensor in trained.items() if "lora_B" in name]  # from zero
    assert moved
    assert all(torch.count_nonzero(tensor) for tensor in moved)
