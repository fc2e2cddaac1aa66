"""`bdpo doctor`: the environment, and what does not depend on a host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import bdpo
from doctor_runs import doctor


def plant(folder: Path, name: str, release: str) -> None:
    """A release of a package, as far as its metadata says so."""
    info = folder / f"{name}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


def test_the_environment_of_these_tests() -> None:
    code, found, rows = doctor()
    assert code == 0
    assert rows == []
    assert found["TRL"][0][1].endswith("which is tested")
    assert found["entry point"] == [("ok", "active: PyTorch calls it when it is imported")]
    assert found["GPU"][0][0] == "not known"
    assert found["flash-attention"][0][1] == "not usable: RuntimeError: there is no GPU"


def test_a_wrong_release_of_a_host(tmp_path, monkeypatch) -> None:
    plant(tmp_path, "llamafactory", "0.9.4")
    plant(tmp_path, "trl", "1.8.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, found, _ = doctor()
    assert code == 1
    assert found["LLaMA-Factory"] == [("failed", "0.9.4 is refused; tested: 0.9.5")]
    assert found["TRL"][0][0] == "ok"  # beside LLaMA-Factory, which has its own

    (tmp_path / "llamafactory-0.9.4.dist-info").rename(tmp_path / "x")
    _, found, _ = doctor()
    assert found["TRL"] == [("warning", "1.8.0 is not tested; tested: 1.9.0, 1.16.0")]


@pytest.mark.parametrize("variable", ["BDPO_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_autoload_that_is_off(variable, tmp_path, monkeypatch) -> None:
    plant(tmp_path, "llamafactory", "0.9.5")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(variable, "0")
    code, found, _ = doctor()
    assert code == 1
    assert found["entry point"] == [("warning", f"off: the environment variable {variable} is 0")]
    assert found["key in LLaMA-Factory"][0][0] == "failed"
    if "key in Axolotl" in found:
        words = "`rl: bdpo` works only with `plugins: [bdpo_plugin.BDPOPlugin]`"
        assert found["key in Axolotl"] == [("warning", words)]


@pytest.mark.slow
def test_a_plugin_that_cannot_be_imported(tmp_path) -> None:
    """A dependency of it is broken; nothing of that is in this process."""
    pytest.importorskip("axolotl")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('planted: trl is broken')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    tool = Path(sys.executable).with_name("bdpo")
    done = subprocess.run(
        [str(tool), "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    found = {f["name"]: (f["state"], f["words"]) for f in json.loads(done.stdout)["findings"]}
    assert found["key in Axolotl"][0] == "failed"
    assert "the plugin is not importable" in found["key in Axolotl"][1]
    assert "planted: trl is broken" in found["key in Axolotl"][1]
    assert found["TRL"][0] == "failed"


def test_what_is_no_configuration(tmp_path) -> None:
    (tmp_path / "x.yml").write_text("base_model: a\nrl: kto\n")
    code, found, _ = doctor(tmp_path / "x.yml")
    assert code == 1
    assert found["keys"][0][0] == "failed"
    assert "`rl: kto`" in found["keys"][0][1]


def test_a_fix_is_shown_in_whole_lines_that_can_be_copied(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BDPO_AUTOLOAD", "0")
    (tmp_path / "x.yml").write_text("base_model: a\nrl: kto\n")
    code, shown = bdpo("doctor", str(tmp_path / "x.yml"))
    assert code == 1
    assert "\n# fix:\nunset BDPO_AUTOLOAD\n" in shown
    assert shown.endswith("\n# fix:\nrl: bdpo\n")
