"""The marks that count lines (tests/lines) find what coverage.py finds, and change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coverage import Coverage

FOLDER = Path(__file__).with_name("lines")

#: A module of the package, with each kind of statement that has lines of its own.
SOURCE = '''"""Docstring."""
from __future__ import annotations

import dataclasses
import functools


@dataclasses.dataclass
class Pair:
    """Docstring."""

    one: int
    two: int = 2

    @functools.cached_property
    def total(self):
        """Docstring."""
        return self.one + self.two

    def never(self):
        return None


def kind(value):
    match value:
        case int():
            found = "int"
        case str():
            found = "str"
        case _:
            found = "other"
    try:
        if value == 3:
            raise ValueError(
                "three"
            )
        elif value == 4:
            return "four"
        else:
            found += "!"
    except KeyError:
        found = "key"
    except ValueError:
        found = "error"
    finally:
        found += "."
    for _ in ():
        found = "never"
    else:
        found += ";"
    while found == "never":
        break
    with open("/dev/null") as file:
        global seen
        seen = file.name
    return found


print(Pair(1).total, kind(3), kind("x"))
'''

IMPORT = "import os, bdpo_plugin.sample"


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "bdpo_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "sample.py").write_text(SOURCE)
    return tmp_path


def run(package, *command):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [FOLDER, package])),
        "BDPO_LINES": str(package / "found"),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=package, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def counted(package):
    """The lines of the sample of each process that has ended."""
    files = (package / "found").glob("*.json")
    return [json.loads(f.read_text())[str(package / "bdpo_plugin/sample.py")] for f in files]


def test_the_lines_are_those_of_coverage_py(package):
    shown = run(package, "-c", IMPORT)
    (mine,) = counted(package)
    plain = Coverage(data_file=str(package / "data"), include=[f"{package}/bdpo_plugin/*"])
    code = (
        "from coverage import Coverage\n"
        f"c = Coverage(data_file={str(package / 'data')!r}, source=['bdpo_plugin']); c.start()\n"
        "import bdpo_plugin.sample; c.stop(); c.save()"
    )
    unmarked = {k: v for k, v in os.environ.items() if k != "BDPO_LINES"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package,
        env=unmarked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == shown == "3 error.; str!.;\n"
    plain.load()
    path = str(package / "bdpo_plugin" / "sample.py")
    _, statements, _, missing, _ = plain.analysis2(path)
    assert set(statements) - set(mine) == set(missing)
    assert missing


@pytest.mark.parametrize("how", ["", "os._exit(0)", "os.fork()", "raise SystemExit"])
def test_every_process_leaves_its_lines(package, how):
    run(package, "-c", f"{IMPORT}; {how}")
    found = counted(package)
    assert len(found) == (2 if "fork" in how else 1)
    assert all(lines == found[0] for lines in found)


def test_nothing_is_written_where_python_looks_for_compiled_files(package):
    run(package, "-c", IMPORT)
    assert not list(package.rglob("*.pyc"))


def test_a_process_that_cannot_write_its_lines_ends_all_the_same(package):
    """Such as one that has become another user."""
    (package / "found").write_text("no folder")
    with pytest.raises(AssertionError, match="status 5"):
        run(package, "-c", f"{IMPORT}; os._exit(5)")
