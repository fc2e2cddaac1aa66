"""The entry point, in interpreters of their own: when its hooks fire, and what a failure costs."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

#: A package `target`, and `ours`, whose hook prints what it was given.
FILES = {
    "target/__init__.py": "",
    "target/module.py": "before = 1\nimport trigger\nafter = 2\n",
    "trigger.py": "",
    "ours.py": "def hook(module): print('hook', module.__name__, hasattr(module, 'after'))\n",
    "broken.py": "raise ImportError('no such thing as libfoo')\n",
}
SETUP = "from bdpo_plugin import autoload\nautoload.HOOKS = {'target.module': 'ours:hook'}\n"


@pytest.fixture
def run(tmp_path):
    def run(code: str, *, warn: bool = False, **env: str) -> list[str]:
        """The lines that `code` prints; a warning is an error unless `warn`."""
        command = [sys.executable, *([] if warn else ["-W", "error"]), "-c", code]
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path} | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    (tmp_path / "target").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return run


ONCE = ["hook target.module True"]


def test_target_imported_later(run) -> None:
    code = f"{SETUP}autoload.install()\nprint('installed')\nimport target.module"
    assert run(code) == ["installed", *ONCE]


def test_target_imported_before(run) -> None:
    assert run(f"{SETUP}import target.module\nautoload.install()\nprint('end')") == [*ONCE, "end"]


def test_target_half_imported(run, tmp_path) -> None:
    """The target is the one who imports torch; the hook waits until it is complete."""
    (tmp_path / "trigger.py").write_text(f"{SETUP}autoload.install()\nprint('installed')\n")
    code = (
        "from target.module import after\nprint('imported', after)\n"
        "import target\ntarget.module = 1; target.other = 2\nprint(type(target).__name__)"
    )
    assert run(code) == ["installed", *ONCE, "imported 2", "module"]


def test_target_never_imported(run) -> None:
    code = f"{SETUP}autoload.install()\nimport sys\nprint('ours' in sys.modules)"
    assert run(code) == ["False"]


def test_switched_off(run) -> None:
    code = f"{SETUP}autoload.install()\nimport target.module"
    assert run(code, BDPO_AUTOLOAD="0") == []


@pytest.mark.parametrize("hook", ["broken:hook", "ours:missing", "absent:hook"])
def test_failing_hook_is_a_warning(run, hook) -> None:
    code = (
        f"{SETUP}autoload.HOOKS['target.module'] = {hook!r}\nautoload.install()\n"
        "import target.module\nprint(target.module.after)"
    )
    shown = "\n".join(run(code, warn=True))
    assert shown.splitlines()[-1] == "2"
    assert "RuntimeWarning: B-DPO could not hook into its host, which will not know" in shown
    reasons = {"broken": "no such thing as libfoo", "ours": "missing", "absent": "'absent'"}
    assert reasons[hook.partition(":")[0]] in shown
    assert "set BDPO_AUTOLOAD=0 to silence this" in shown


def test_install_without_wrapt_is_a_warning(run) -> None:
    code = f"{SETUP}import sys\nsys.modules['wrapt'] = None\nautoload.install()\nprint('end')"
    *warning, end = run(code, warn=True)
    assert end == "end"
    assert "import of wrapt halted" in "\n".join(warning)


@pytest.mark.skipif(
    "bdpo_plugin" not in entry_points(group="torch.backends").names,
    reason="bdpo-plugin is not installed, only importable",
)
@pytest.mark.parametrize("broken", ["wrapt", "bdpo_plugin.settings", "bdpo_plugin.hosts"])
def test_torch_survives_a_broken_installation(run, broken) -> None:
    code = f"import sys\nsys.modules[{broken!r}] = None\nimport torch\nprint(torch.ones(2).sum())"
    assert run(code, warn=True)[-1] == "tensor(2.)"
