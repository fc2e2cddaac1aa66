"""A callable that weighs the pairs is in all that a run records, and no other goes on from it."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from running import trainer
from torch import nn

from bdpo_plugin import BalanceWeights, BDPOError, BDPOTrainer, bdpo_loss
from bdpo_plugin.output.weighing_record import OVERRIDDEN, callable_record, difference, in_words
from bdpo_plugin.training.checkpoints import FILE

FACTOR = 0.5


def by(factor):
    def weights(won, lost):
        chosen = 1 - factor * torch.sign(won - lost)
        return BalanceWeights(chosen, 2 - chosen, torch.ones_like(chosen))

    return weights


def with_default(won, lost, factor=0.5):
    return by(factor)(won, lost)


def with_global(won, lost):
    return by(FACTOR)(won, lost)


class Weigher:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, won, lost):
        return by(self.factor)(won, lost)

    def method(self, won, lost):
        return by(self.factor)(won, lost)


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, won, lost):
        return by(self.factor)(won, lost)


class Learnt(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, won, lost):
        return by(self.factor)(won, lost)


def capturing(value):
    return lambda won, lost: by(value["a"][0])(won, lost)


@pytest.mark.parametrize(
    "make",
    [
        by,
        lambda factor: lambda won, lost: by(factor)(won, lost),
        lambda factor: functools.partial(with_default, factor=factor),
        lambda factor: functools.partial(functools.partial(with_default), factor=factor),
        Weigher,
        lambda factor: Weigher(factor).method,
        Slotted,
        Learnt,
        lambda factor: capturing({"a": [factor]}),
        lambda factor: capturing({"a": torch.tensor([factor])}),
    ],
    ids=range(10),
)
def test_two_that_differ_in_a_number_are_told_apart(make) -> None:
    first, same, other = (callable_record(make(f)) for f in (0.5, 0.5, -0.9))
    assert first == same
    assert difference(first, same) is False
    assert difference(first, other) is True
    assert "0x" not in json.dumps(first)


def test_functions_of_one_line_and_global_numbers(monkeypatch) -> None:
    one, two = (lambda won, lost: by(0.5)(won, lost), lambda won, lost: by(0.6)(won, lost))
    assert difference(*(callable_record(f) for f in (one, two))) is True
    before = callable_record(with_global)
    assert before["values"] == {"FACTOR": "0.5"}
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 0.7)
    assert difference(before, callable_record(with_global)) is True
    assert in_words(before).startswith(f"{__name__}.with_global (FACTOR = 0.5, source ")


SCRIPT = """
import torch
from bdpo_plugin.training.checkpoints import FILE
from bdpo_plugin.output.weighing_record import callable_record, in_words
{blank}
def helper(x): return {what}
def named(won, lost): return helper(won)
class Called:
    def __init__(self): self.names = {{"a", "b", "c"}}
    def __call__(self, won, lost): return helper(won)
if __name__ == "__main__":
    for given in (named, Called(), lambda won, lost, k=3: helper(won), max, torch.sign):
        print(in_words(callable_record(given)))
"""


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path) -> None:
    def records(name, blank=""):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(SCRIPT.format(blank=blank, what="x * 2"))
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert records("a/run.py") == records("b/renamed.py", blank="# later\n")


def test_what_an_imported_module_calls_is_read_as_well(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    records = []
    for number, what in enumerate(("x", "x * 2")):
        (tmp_path / f"mine{number}.py").write_text(SCRIPT.format(blank="", what=what))
        module = importlib.import_module(f"mine{number}")
        record = callable_record(module.named) | {"name": "mine.named"}
        records.append(record)
    assert difference(*records) is True


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self, won, lost):
        return by(0.5)(won, lost)


@pytest.mark.parametrize(
    "given",
    [max, torch.sign, functools.lru_cache(with_default), torch.vmap(with_default), Hostile()],
    ids=["builtin", "torch", "cache", "vmap", "hostile"],
)
def test_whatever_it_is_nothing_is_raised(given) -> None:
    record = callable_record(given)
    assert difference(record, callable_record(given)) in (False, None)
    assert "0x" not in json.dumps(record)


def test_what_cannot_be_read_cannot_be_told() -> None:
    record = callable_record(capturing({"a": [(n for n in (1, 2))]}))  # no generator can be read
    assert record["content"] is None
    assert difference(record, record) is None


OPTIONS = {"save_strategy": "steps", "save_steps": 1, "bdpo_control": "swapped"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighed")
    made = trainer(output_dir=folder, weigh=by(0.5), max_steps=1, **OPTIONS)
    made.train()
    return folder


def test_all_that_a_run_records_names_it(run) -> None:
    name = f"{__name__}.by.<locals>.weights"
    record = json.loads((run / "bdpo" / "run.json").read_text())
    assert record["weigh"]["name"] == name
    assert record["weigh"]["values"] == {"factor": "0.5"}
    assert record["control"] == record["settings"]["bdpo_control"] == "swapped"
    metadata = pq.read_schema(run / "bdpo" / "reference_scores.parquet").metadata
    assert metadata[b"weigh"].decode().startswith(f"{name} (factor = 0.5, source ")
    assert metadata[b"bdpo_control"] == b"swapped"
    card = (run / "README.md").read_text()
    assert f"{name} (factor = 0.5, source" in card
    for key in OVERRIDDEN:  # they were not in force
        assert key not in record["settings"]
        assert key.encode() not in metadata
        assert key not in card


@pytest.mark.parametrize(
    ("weigh", "words"),
    [
        (by(0.5), None),
        (by(-0.9), r"`weigh`: .*weights \(factor = 0.5, .* there, .*\(factor = -0.9, .* here"),
        (Weigher(0.5), r"`weigh`: .*weights \(.*\) there, .*Weigher \(factor = 0.5, .* here"),
        (None, r"`weigh`: .*weights \(factor = 0.5, .*\) there, none here"),
    ],
    ids=["same", "number", "callable", "none"],
)
def test_no_run_goes_on_with_other_weights(run, tmp_path, weigh, words) -> None:
    made = trainer(output_dir=tmp_path, weigh=weigh, max_steps=2, **OPTIONS)
    if words is None:
        assert made.train(resume_from_checkpoint=str(run / "checkpoint-1")).global_step == 2
        return
    with pytest.raises(BDPOError, match=words):
        made.train(resume_from_checkpoint=str(run / "checkpoint-1"))


class Twice(BDPOTrainer):
    @staticmethod
    def pair_loss(*logps_and_weights, **options):
        return 2 * bdpo_loss(*logps_and_weights, **options)


def test_nor_with_another_loss_of_the_pairs(run, tmp_path) -> None:
    made = trainer(Twice, output_dir=tmp_path, weigh=by(0.5), max_steps=2, **OPTIONS)
    with pytest.raises(BDPOError, match=r"`pair_loss`: none there, .*Twice.pair_loss \(.* here"):
        made.train(resume_from_checkpoint=str(run / "checkpoint-1"))


def test_where_it_cannot_be_told_the_user_is_warned(run, tmp_path, capsys) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(run / "checkpoint-1", folder)
    said = json.loads((folder / FILE).read_text())
    del said["weigh"]  # as a release that did not record it has left it
    (folder / FILE).write_text(json.dumps(said))
    made = trainer(output_dir=tmp_path, weigh=by(0.5), max_steps=2, **OPTIONS)
    made.train(resume_from_checkpoint=str(folder))
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "It is not known whether `weigh` is what the checkpoint was trained with" in out
