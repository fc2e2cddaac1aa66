"""The wheel as a user installs it: what is in it, and what it does beside Axolotl."""

import configparser
import importlib.util
import os
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import bdpo_plugin

ROOT = Path(__file__).parents[1]
VERSION = bdpo_plugin.__version__
INFO = f"bdpo_plugin-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def content(wheel) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a new environment: the wheel, and behind it the packages of the current one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home)
    bin_dir = home / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python"]
    pip += ["install", "--no-deps", "--no-index", wheel]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Only now, or pip takes the current environment's own bdpo-plugin for an installed one. The
    # .pth files of these folders are not read, so an editable install there stays out of sight.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "host.pth").write_text("\n".join(site.getsitepackages()))
    for name in ("axolotl", "accelerate"):
        for entry in entry_points(group="console_scripts", name=name):
            script = bin_dir / name
            script.write_text(
                f"#!/usr/bin/env python\nfrom {entry.module} import {entry.attr}\n{entry.attr}()\n"
            )
            script.chmod(0o755)
    return bin_dir


def run(bin_dir: Path, cwd: Path, *command: str) -> str:
    """What a command of the environment writes, in a folder outside the checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BDPO_AUTOLOAD")}
    env["PATH"] = f"{bin_dir}{os.pathsep}{env['PATH']}"
    program = bin_dir / command[0]
    done = subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout


def test_holds_the_package_and_nothing_else(content) -> None:
    assert {name.split("/")[0] for name in content} == {"bdpo_plugin", INFO}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "bdpo_plugin").rglob("*.py")}
    assert {name for name in content if name.endswith(".py")} == modules
    assert {"bdpo_plugin/cli/page.css", "bdpo_plugin/cli/page.js"} <= content.keys()


def test_says_that_it_is_typed(content) -> None:
    assert content["bdpo_plugin/py.typed"] == ""
    metadata = Parser().parsestr(content[f"{INFO}/METADATA"])
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_holds_the_recipes_and_the_keys_of_the_hosts(content) -> None:
    recipes = (ROOT / "example_configs").rglob("*.yml")
    texts = {f"bdpo_plugin/{p.relative_to(ROOT).as_posix()}": p.read_text() for p in recipes}
    assert "bdpo_plugin/example_configs/axolotl/tiny-cpu.yml" in texts
    keys = (ROOT / "bdpo_plugin" / "hosts").rglob("keys.yml")
    texts |= {path.relative_to(ROOT).as_posix(): path.read_text() for path in keys}
    assert "bdpo_plugin/hosts/trl/keys.yml" in texts
    assert {name: content[name] for name in content if name.endswith(".yml")} == texts


def test_holds_the_entry_points_and_the_licence(content) -> None:
    declared = configparser.ConfigParser()
    declared.read_string(content[f"{INFO}/entry_points.txt"])
    assert {name: dict(declared[name]) for name in declared.sections()} == {
        "console_scripts": {"bdpo": "bdpo_plugin.cli:main"},
        "axolotl.cli_commands": {"bdpo": "bdpo_plugin.cli:main"},
        "torch.backends": {"bdpo_plugin": "bdpo_plugin.autoload:install"},
    }
    assert content[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_text()


def test_requirements_leave_the_pins_to_the_host(content) -> None:
    metadata = Parser().parsestr(content[f"{INFO}/METADATA"])
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert core
    assert [r for r in core if any(sign in r for sign in ("==", "<", "~", "!"))] == []


def test_is_what_the_new_environment_imports(installed, tmp_path) -> None:
    code = (
        "import bdpo_plugin, importlib.metadata as m;"
        "print(bdpo_plugin.__file__, m.distribution('bdpo-plugin').locate_file(''), sep='\\n')"
    )
    for place in run(installed, tmp_path, "python", "-c", code).splitlines():
        assert Path(place).is_relative_to(installed.parent)


def test_bdpo_lists_and_copies_its_recipes(installed, tmp_path) -> None:
    listed = run(installed, tmp_path, "bdpo", "recipes", "list", "--json")
    assert "axolotl/tiny-cpu.yml" in listed
    assert str(installed.parent) in listed
    run(installed, tmp_path, "bdpo", "recipes", "copy", "tiny-cpu")
    recipe = ROOT / "example_configs" / "axolotl" / "tiny-cpu.yml"
    assert (tmp_path / "tiny-cpu.yml").read_text() == recipe.read_text()


def test_torch_calls_the_entry_point(installed, tmp_path) -> None:
    code = (
        "import sys, torch;"
        "own = {m for m in sys.modules if m.startswith('bdpo_plugin')};"
        "print(torch.ones(2).sum().item(), sorted(own), 'transformers' in sys.modules)"
    )
    shown = run(installed, tmp_path, "python", "-W", "error::RuntimeWarning", "-c", code)
    assert shown.splitlines()[-1] == "2.0 ['bdpo_plugin', 'bdpo_plugin.autoload'] False"


@pytest.fixture(scope="module")
def workplace(installed, tmp_path_factory) -> Path:
    """A folder with the demo's model, unpretrained, and a little of its data."""
    folder = tmp_path_factory.mktemp("workplace")
    size = ("--steps", "0", "--train-pairs", "16", "--eval-pairs", "4")
    run(installed, folder, "bdpo", "tiny", "bdpo-demo/tiny", *size)
    run(installed, folder, "bdpo", "recipes", "copy", "tiny-cpu")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="axolotl is not installed")
def test_trains_in_axolotl(installed, workplace) -> None:
    """By the key alone; every recipe's test names the plugin as well."""
    config = yaml.safe_load((workplace / "tiny-cpu.yml").read_text())
    del config["plugins"]
    out = config["output_dir"] = "run-key"
    (workplace / "key.yml").write_text(yaml.safe_dump(config))
    log = run(installed, workplace, "axolotl", "train", "key.yml")
    assert log.count("'bdpo/scale'") == config["num_epochs"]  # 16 pairs are one batch
    assert "'eval_bdpo/scale'" in log
    scores = workplace / out / "bdpo" / "reference_scores.parquet"
    assert pq.read_table(scores).num_rows == 16
    assert (workplace / out / "adapter_model.safetensors").is_file()
