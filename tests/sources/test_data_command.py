"""`bdpo data`: the sources' files, their manifests, and what is refused."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from cases import first
from click.testing import CliRunner
from small_sources import HH, PKU, write_xstest

from bdpo_plugin.cli import main
from bdpo_plugin.sources import xstest
from bdpo_plugin.sources.selection import select


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def read(file):
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    manifest = json.loads(file.with_suffix(".manifest.json").read_text())
    assert manifest["pairs"] == len(pairs) == len(manifest["rows"])
    known = json.loads(file.with_name("dataset_info.json").read_text())
    assert known[file.stem]["file_name"] == file.name
    return pairs, manifest


@pytest.fixture
def sources(tmp_path):
    """Arguments of a command -> the pairs that it should make."""
    (tmp_path / "pku.jsonl").write_text("\n".join(map(json.dumps, PKU)))
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, HH)))
    write_xstest(tmp_path / "xstest")
    return {
        "pku-saferlhf": ("--data", tmp_path / "pku.jsonl"),
        "hh-rlhf": ("--data", tmp_path / "hh.jsonl.gz"),
        "xstest": ("--data", tmp_path / "xstest"),
    }


@pytest.mark.parametrize(
    ("name", "labels", "left"),
    [
        ("pku-saferlhf", ["safe", "unsafe"], {"both responses unsafe": 1}),
        ("hh-rlhf", ["harmless"], {"identical responses": 1}),
        ("xstest", ["safe", "unsafe"], {"no full refusal": 1, "duplicate prompt": 1}),
    ],
)
def test_the_same_file_twice_with_all_rows_told(sources, tmp_path, name, labels, left) -> None:
    for out in ("one", "two"):
        assert "Wrote" in run(name, *sources[name], "--output", tmp_path / out / "made.jsonl")
    pairs, manifest = read(tmp_path / "one" / "made.jsonl")
    assert read(tmp_path / "two" / "made.jsonl") == (pairs, manifest)
    assert sorted({pair["label"] for pair in pairs}) == labels
    assert left.items() <= manifest["counts"].items()
    assert manifest["source"]["sha256"]
    assert str(tmp_path) not in json.dumps(manifest)


def test_datasets_beside_each_other_stay_known(sources, tmp_path) -> None:
    for name, given in sources.items():
        run(name, *given, "--output", tmp_path / "all" / f"{name}.jsonl")
    assert [*json.loads((tmp_path / "all" / "dataset_info.json").read_text())] == [*sources]


def test_what_is_chosen_in_xstest(tmp_path) -> None:
    answers = xstest.read_answers(write_xstest(tmp_path))
    pairs, _ = select(xstest.sort(answers), {}, per_prompt=9)
    found = {
        (p["type"], p["chosen"]["content"], p["chosen_model"], p["rejected_model"]) for p in pairs
    }
    assert found == {
        ("contrast_homonyms", "No, I will not.", "two", "one"),
        ("homonyms", "Use kill.", "one", "two"),
        ("homonyms", "Press ctrl-c.", "three", "two"),
    }
    held = select(xstest.sort(answers, ["homonyms"]), {})[0]
    assert {pair["label"] for pair in held} == {"safe"}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pku-saferlhf", ("--data", "absent.jsonl"), "--data absent.jsonl could not be loaded"),
        ("hh-rlhf", ("--data", "absent.jsonl"), "--data absent.jsonl could not be loaded"),
        ("xstest", ("--types", "homonym"), "--types: homonym is none of contrast_homonyms"),
    ],
)
def test_refused(sources, tmp_path, name, change, words, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "made.jsonl"
    shown = run(name, *sources[name], *change, "--output", output, code=1)
    assert words in " ".join(shown.split())
    assert not output.exists()


@pytest.mark.slow  # newer clients of the hub try for half a minute
@pytest.mark.parametrize("command", first(1, ["data", "mi"]))
def test_no_network_is_told(command, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    arguments = {
        "data": ["pku-saferlhf"],
        "mi": ["--model", str(tmp_path), "--dataset", "a/b"],
    }[command]
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    ours = [sys.executable, "-c", "from bdpo_plugin.cli import main; main()", command, *arguments]
    done = subprocess.run(
        [*ours, "--output", tmp_path / "made.jsonl"],
        env={**os.environ, **nowhere, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "could not be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_are_told(sources, tmp_path) -> None:
    output = tmp_path / "made.jsonl"
    shown = run("hh-rlhf", *sources["hh-rlhf"], "--pairs", 50, "--output", output)
    assert "Only 2 of the 50 pairs wanted of `harmless`" in shown


def test_no_labelled_answers(tmp_path) -> None:
    (tmp_path / "prompts.csv").write_text("id,prompt,type\n1,How?,homonyms\n")
    shown = run("xstest", "--data", tmp_path, "--output", tmp_path / "made.jsonl", code=1)
    assert "no file of labelled answers" in " ".join(shown.split())
