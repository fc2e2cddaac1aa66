"""docker/Dockerfile does what the README says, and its documentation what it can do.

No image is built here: the nightly workflow does that, where there is a Docker.
"""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from bdpo_plugin.cli import main

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8").split("## In a container")[1]
SECTION = PAGE.partition("\n## ")[0]
#: The arguments of a build, with their defaults.
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
#: The releases that are tested, by host.
PINS = dict(re.findall(r"^(TORCH|AXOLOTL|TRL|LLAMAFACTORY)\s*:= (.*)$", MAKEFILE, re.MULTILINE))


def installs(arguments: dict[str, str]) -> list[str]:
    """What `pip install` is called with, in order, with these arguments of a build."""
    words = re.findall(r"pip install ([^;\n]+)", DOCKERFILE)
    filled = [re.sub(r"\$(\w+)", lambda name: arguments[name[1]], word) for word in words]
    return [" ".join(shlex.split(word)) for word in filled if word.strip()]


def test_the_commands_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(r"install `(.+?)` first, then `(.+?)`, then this package", readme)
    (plugin,) = re.findall(r"^pip install (\./\S+)$", readme, re.MULTILINE)
    assert installs(ARGUMENTS) == [told[1], told[2], f"{plugin}[plot]"]
    assert {"DEVICE": "cuda", "TORCH": PINS["TORCH"], "HOST": PINS["AXOLOTL"]} == ARGUMENTS


def test_the_page_names_arguments_that_exist_and_the_tested_releases() -> None:
    given = re.findall(r'--build-arg (\w+)=("[^"]*"|[^\s`]*)', SECTION)
    values = [(name, value.strip('"')) for name, value in given]
    assert {name for name, _ in values} <= ARGUMENTS.keys()
    assert values == [
        ("HOST", PINS["TRL"]),
        ("HOST", PINS["LLAMAFACTORY"]),
        ("TORCH", ""),
        ("DEVICE", "cpu"),
    ]
    assert f"\n    {values[3][1]}) " in DOCKERFILE


@pytest.mark.parametrize("line", re.findall(r"^docker run .+$", SECTION, re.MULTILINE))
def test_the_page_runs_commands_that_exist(line) -> None:
    words = shlex.split(line)
    tool, name, config = words[words.index("bdpo") + 1 :]
    assert tool == "axolotl" or name in main.commands
    assert config == "config.yml"


def test_what_the_wheel_is_made_of_reaches_the_build() -> None:
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("bdpo_plugin", "example_configs", "README.md", "LICENSE", "pyproject.toml"):
        assert any(fnmatch(name, pattern) for pattern in kept), name
        assert name in project or name == "pyproject.toml"
        assert (ROOT / name).exists()
    assert len(kept) == 5


def test_the_nightly_workflow_builds_it_by_the_command_of_the_page() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text("utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["container"]["steps"] if "run" in step]
    build, run = commands
    (told,) = re.findall(r"^docker build .+$", SECTION, re.MULTILINE)
    assert build.replace("--build-arg DEVICE=cpu ", "") == told
    assert run.split()[2:] == ["bdpo", "bdpo", "doctor"]
