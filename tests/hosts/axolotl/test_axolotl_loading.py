"""Data and models that cannot be loaded: the file, the line, the key, and what to do."""

import json

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from transformers import T5Config

from bdpo_plugin.hosts.axolotl import loading
from bdpo_plugin.settings import BDPOError

GOOD = {"messages": "Is it?", "chosen": "It is.", "rejected": "No."}
LINE = json.dumps(GOOD) + "\n"

BROKEN = {
    "no rows": ("\n \n", "`{}`: it is empty. Give it rows"),
    "cut off": (LINE * 2 + LINE[:20] + "\n" + LINE, "`{}`: line 3 is no JSON (Unterminated string"),
    "after empty lines": (LINE + "\n\nmessages: Is it?\n", "`{}`: line 4 is no JSON (Expecting"),
    "as Python writes it": (f"{GOOD}\n", "`{}`: line 1 is no JSON (Expecting property name"),
    "a list": (LINE + "[1]\n", "`{}`: line 2 is [1], not an object. Write {{"),
    "text": ('"Is it?"\n', '`{}`: it is "Is it?", not rows'),
    "whole": ("[\n" + LINE + ",\n{]", "`{}`: line 4 is no JSON (Expecting property name"),
    "whole, of text": (json.dumps([GOOD, "x"]), '`{}`: row 1 is "x", not an object'),
}


def load(path, **entry):
    """What is loaded of a file, by the wrapped function of Axolotl's."""
    from axolotl.utils.data import rl

    loading.wrap_loading(rl)
    whole = DictDefault(path=str(path), **{loading.NAME: ""}, **entry)
    return rl.load_dataset_with_config(whole, False)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(case, tmp_path) -> None:
    text, said = BROKEN[case]
    (path := tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(BDPOError) as refusal:
        load(path)
    assert said.format(path) in str(refusal.value)


def test_a_split_that_a_file_has_not(tmp_path) -> None:
    (path := tmp_path / "pairs.jsonl").write_text(LINE)
    with pytest.raises(BDPOError, match=r"split: test` cannot be loaded: ValueError: Unknown spl"):
        load(path, split="test")
    assert load(path)["bdpo_file_row"] == ["0"]


@pytest.mark.parametrize("place", ["datasets", "test_datasets"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./no/pairs.jsonl", ".path: ./no/pairs.jsonl`: there is no such file or folder. (The pa"),
        ("pairs.parquet", ".path: pairs.parquet`: there is no such file or folder"),
        ("empty.jsonl", "empty.jsonl` is an empty file. Nothing has been trained."),
    ],
)
def test_a_file_that_is_not_there_or_empty(place, path, said, tmp_path) -> None:
    """Looked at before any other is loaded: here none could be."""
    from axolotl.utils.data import rl

    loading.wrap_loading(rl)
    (tmp_path / "empty.jsonl").touch()
    path = str(tmp_path / path) if path == "empty.jsonl" else path
    entries = {"datasets": [{"path": str(tmp_path)}], "test_datasets": [{"path": str(tmp_path)}]}
    cfg = DictDefault(bdpo=True, rl=RLType.DPO, **entries | {place: [{"path": path}]})
    with pytest.raises(BDPOError) as refusal:
        rl._load_or_create_dataset_split(cfg, None, split="train")
    assert f"`{place}[0]" in str(refusal.value)
    assert said in str(refusal.value)


def test_rows_that_are_all_too_long(refusal, loaded) -> None:
    """Both remedies are followed; Axolotl's folder knows nothing of the second."""
    rows = [{**GOOD, "chosen": "It is. " * 30, "rejected": "No. " * 30}] * 3
    told = refusal(rows, sequence_len=40)
    assert "Every row of " in told
    assert (
        "train.jsonl is longer than `sequence_len: 40` tokens, and Axolotl drops it. Raise" in told
    )
    assert "or have the responses cut by `excess_length_strategy: truncate`" in told
    assert len(loaded(sequence_len=40, excess_length_strategy="truncate")) == 3
    assert len(loaded(sequence_len=400)) == 3


def test_a_model_that_is_none(config, tiny, tmp_path) -> None:
    with pytest.raises(BDPOError) as refusal:
        load_cfg(config(base_model="./no-such-model"))
    assert "`base_model: ./no-such-model` cannot be loaded: there is no such folder" in str(
        refusal.value
    )
    with pytest.raises(BDPOError) as refusal:
        load_cfg(config(base_model=str(tmp_path)))
    told = str(refusal.value)
    assert f"`base_model: {tmp_path}` cannot be loaded: " in told
    assert "config.json" in told
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(BDPOError) as refusal:
        load_cfg(config(base_model=str(tmp_path / "t5")))
    assert "is an encoder-decoder model (`model_type: t5`)" in str(refusal.value)
