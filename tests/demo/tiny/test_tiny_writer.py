"""What `write` leaves on disk, and that pretraining learns."""

import hashlib
import json
import math
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs, pretrain, write


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_the_same_seed_writes_the_same_bytes(tmp_path) -> None:
    options = {"steps": 2, "hidden_size": 16, "layers": 1, "progress": False}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        write(tmp_path / name, seed=seed, **options)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {"model/model.safetensors", "train.jsonl", "eval.jsonl"}


def test_what_it_writes_can_be_loaded(tmp_path) -> None:
    write(tmp_path, steps=0, train_pairs=6, eval_pairs=4, hidden_size=16, layers=1, bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.bos_token == "<|bos|>"
    for split, count in (("train", 6), ("eval", 4)):
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == preference_pairs(count, split=split)
    assert len((tmp_path / "prompts.txt").read_text().splitlines()) >= 4


def test_pretraining_learns() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=64, layers=1)
    loss = pretrain(model, tokenizer, steps=80, batch_size=8, progress=False)
    assert loss < 0.6 * math.log(len(tokenizer))
    assert not model.training
