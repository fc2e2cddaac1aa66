"""The table of architectures: some of each kind anew, and that docs/architectures.md has them all.

The whole is `python -m benchmarks.architectures`.
"""

import math

import pytest
import torch
import transformers

from bdpo_plugin.model import reader
from bdpo_plugin.model.padding import Padding, PaddingEffect
from bdpo_plugin.model.probe import Capabilities, SharedPrefixSupport
from bdpo_plugin.model.traits import RowRules
from benchmarks.architectures import DTYPES, PAGE, faults, look, names, tiny

#: Of each kind of layer, position, output layer and treatment one.
SOME = [
    *("llama", "gpt2", "granitemoe", "deepseek_v3"),
    *("gemma2", "gemma3_text", "mixtral"),
    *("deepseek_v32", "cpmant"),
    *("gpt_oss", "bloom", "falcon_alibi", "gptj", "llama4_text", "opt"),
    *("granitemoehybrid", "lfm2", "lfm2_moe", "mamba", "qwen3_next", "recurrent_gemma", "rwkv"),
]
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|")
]
OF_THIS_RELEASE = f"transformers {transformers.__version__} " in TEXT


@pytest.mark.parametrize("name", SOME)
def test_scores_do_not_move_and_the_page_tells_what_is_done(name):
    found = {dtype: look(tiny(name), dtype, 8) for dtype in DTYPES}
    assert faults(found) == []
    if OF_THIS_RELEASE:
        (row,) = [row for row in ROWS if row[0] == name]
        assert row[1:3] == [one.rows for one in found.values()]
        assert bool(row[7]) == bool(found[torch.float32].depends)


@pytest.mark.skipif(not OF_THIS_RELEASE, reason="another release's page")
def test_the_page_has_every_architecture_and_no_fault():
    assert set(names()) <= {row[0] for row in ROWS}
    assert {row[-1] for row in ROWS if len(row) == 9} <= {"faults", "---", ""}


def test_a_row_that_is_mixed_up_would_be_noticed(monkeypatch):
    same = PaddingEffect(0, 0)
    packed = Capabilities(Padding(same, same), True, SharedPrefixSupport(shared=True))
    monkeypatch.setattr(reader, "probe", lambda *_: packed)
    rules = RowRules(widest=math.inf, longest=math.inf, each_once=False)
    monkeypatch.setattr(reader, "row_rules", lambda *_: rules)
    found = {dtype: look(tiny("lfm2"), dtype) for dtype in DTYPES}
    # in bfloat16 the padding on the left, which it mixes in as well, passes for rounding
    assert [fault for fault in faults(found) if "float32" in fault]
