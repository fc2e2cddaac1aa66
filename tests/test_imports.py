"""Who imports whom, and what an import costs. Each check is a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import bdpo_plugin

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "transformers", "trl", "datasets", "peft", "axolotl", "llamafactory")


def python(code: str) -> str:
    """The standard output of `code` in a new interpreter, at the project's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def heavy_imports(code: str) -> set[str]:
    shown = python(f"import sys\n{code}\nprint(*(m for m in {HEAVY} if m in sys.modules))")
    return set(shown.split())


@pytest.mark.parametrize(
    "code",
    [
        "import bdpo_plugin",
        "import bdpo_plugin; dir(bdpo_plugin); bdpo_plugin.__version__",
        "from bdpo_plugin import BDPOError, BDPOSettings; BDPOSettings(alpha=1)",
        "import bdpo_plugin.autoload",
    ],
)
def test_imports_nothing_heavy(code) -> None:
    assert heavy_imports(code) == set()


def test_objective_imports_torch_alone() -> None:
    """torch itself may bring numpy."""
    code = "from bdpo_plugin import BalanceWeights, balance_weights, bdpo_loss, mutual_information"
    assert heavy_imports(code) - {"numpy"} == {"torch"}


@pytest.mark.parametrize("name", sorted(set(bdpo_plugin.__all__) - {"BDPOPlugin"}))
def test_public_name_resolves(name) -> None:
    value = getattr(bdpo_plugin, name)
    assert value is getattr(bdpo_plugin, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


@pytest.mark.slow
def test_plugin_resolves_beside_axolotl() -> None:
    pytest.importorskip("axolotl")
    out = python("import bdpo_plugin; print(bdpo_plugin.BDPOPlugin.__mro__)")
    assert "axolotl.integrations.base.BasePlugin" in out


AXOLOTL_HELP = """
import sys
from axolotl.cli.main import cli
before = set(sys.modules)
try:
    cli(["--help"])
except SystemExit:
    pass
print(*(m for m in sys.modules if m not in before), sep="\\n")
"""


@pytest.mark.slow
def test_axolotl_has_our_commands_and_imports_nothing_heavy_for_their_help() -> None:
    pytest.importorskip("axolotl")
    shown = python(AXOLOTL_HELP).partition("Commands:")[2]
    new = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert "bdpo" in new
    assert "bdpo_plugin.cli.recipes" in new
    assert new & set(HEAVY) == set()
    code = "from axolotl.cli.main import cli; cli(['bdpo', 'recipes', 'list', '--json'])"
    assert '"name": "axolotl/tiny-cpu"' in python(code)


def test_public_names_are_listed_and_others_refused() -> None:
    assert dir(bdpo_plugin) == sorted(bdpo_plugin.__all__)
    with pytest.raises(AttributeError, match="module 'bdpo_plugin' has no attribute 'BDPO'"):
        bdpo_plugin.BDPO  # noqa: B018


def test_layers() -> None:
    """The contracts of pyproject.toml."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    assert "0 broken" in python(code)
