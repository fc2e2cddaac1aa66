"""The `bdpo` command as a whole, `bdpo tiny`, and `bdpo recipes copy`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import bdpo

from bdpo_plugin import __version__
from bdpo_plugin.cli import main
from bdpo_plugin.recipes.recipe_file import recipe_root

COMMANDS = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")


def test_version_and_help() -> None:
    assert __version__ in bdpo("--version")[1]
    code, shown = bdpo("--help")
    assert code == 0
    for command in main.commands:
        assert command in shown


def test_every_command_is_documented() -> None:
    assert set(re.findall(r"^\| `bdpo (\w+)` \|", COMMANDS, re.MULTILINE)) == set(main.commands)


@pytest.mark.parametrize("title", re.findall(r"^## (bdpo .+)$", COMMANDS, re.MULTILINE))
def test_options_that_are_documented_exist(title) -> None:
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", COMMANDS, re.MULTILINE | re.DOTALL)
    commands = [main.commands[name] for name in re.findall(r"bdpo (\w+)", title)]
    known = {option for command in commands for p in command.params for option in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section))
    assert named <= known
    for command in commands:
        shown = bdpo(command.name, "--help")[1]
        assert " ".join(command.help.split("\n\n")[0].split()) in " ".join(shown.split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, bdpo_plugin.cli\n"
        "print(*{'torch', 'transformers', 'matplotlib', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_tiny(tmp_path) -> None:
    code, shown = bdpo("tiny", str(tmp_path), "--steps", "1", "--train-pairs", "8")
    assert code == 0, shown
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_tiny_with_more_pairs_than_there_are(tmp_path) -> None:
    code, shown = bdpo("tiny", str(tmp_path), "--steps", "0", "--train-pairs", "1000000")
    assert code == 1
    assert "train pairs at most, not 1000000" in shown


@pytest.mark.parametrize("name", ["tiny-cpu", "tiny-cpu.yml", "axolotl/tiny-cpu.yml"])
def test_copy_a_recipe(name, tmp_path) -> None:
    code, shown = bdpo("recipes", "copy", name, str(tmp_path))
    assert code == 0, shown
    source = recipe_root() / "axolotl" / "tiny-cpu.yml"
    assert (tmp_path / "tiny-cpu.yml").read_bytes() == source.read_bytes()


def test_copy_never_overwrites(tmp_path) -> None:
    mine = tmp_path / "tiny-cpu.yml"
    mine.write_text("mine")
    for destination in (tmp_path, mine):
        code, shown = bdpo("recipes", "copy", "tiny-cpu", str(destination))
        assert code == 1
        assert f"{mine} exists already" in shown
    assert mine.read_text() == "mine"


def test_copy_an_unknown_recipe(tmp_path) -> None:
    code, shown = bdpo("recipes", "copy", "nonesuch", str(tmp_path))
    assert code == 1
    assert "no recipe is called 'nonesuch'" in shown
    assert "axolotl/tiny-cpu" in shown


def test_copy_into_a_folder_that_is_not_there(tmp_path) -> None:
    code, shown = bdpo("recipes", "copy", "tiny-cpu", str(tmp_path / "no" / "config.yml"))
    assert code == 1
    assert f"there is no folder {tmp_path / 'no'}" in shown
