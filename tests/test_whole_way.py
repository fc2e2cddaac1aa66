"""From a first look to a shared recipe, by the commands that a user types, each in a process of its
own: beside Axolotl, LLaMA-Factory and TRL, whichever this environment is for."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from real_runs import make_tiny, run_command

from bdpo_plugin.recipes.recipe_file import find_recipe

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

#: Host -> its recipe, its command, and how one of its keys is set on the command line.
HOSTS = {
    "axolotl": ("axolotl/tiny-cpu", "axolotl train {} --launcher python", "--{}={}"),
    "llamafactory": ("llamafactory/tiny", "llamafactory-cli train {}", "{}={}"),
    "trl": ("trl/tiny", "bdpo train {}", "--{}={}"),
}
HOST = next(host for host in HOSTS if find_spec(host))
RECIPE, TRAIN, OPTION = HOSTS[HOST]
EPOCHS = "num_epochs" if HOST == "axolotl" else "num_train_epochs"


def typed(line: str, **environment: str) -> str:
    """What a command printed; it must end well."""
    done = run_command(line.split(), environment)
    return " ".join(done.stdout.split())


def train(file: str, **options: object) -> str:
    dashes = HOST == "axolotl"
    given = [
        OPTION.format(key.replace("_", "-") if dashes else key, value)
        for key, value in options.items()
    ]
    return typed(" ".join([TRAIN.format(file), *given]))


def test_the_whole_way(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tiny(Path("bdpo-demo/tiny"))
    typed(f"bdpo recipes copy {RECIPE} mine.yml")
    run = Path(yaml.safe_load(Path("mine.yml").read_text())["output_dir"])

    assert "takes it" in typed("bdpo doctor mine.yml")
    assert "MI chosen" in typed("bdpo mi mine.yml --output mi")
    assert Path("mi/mi.html").is_file()

    assert " 0 scored now" in train("mine.yml"), "`bdpo mi` has scored these pairs"
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    train("mine.yml", **{EPOCHS: 2, "resume_from_checkpoint": last})
    train("mine.yml", bdpo_alpha=0, output_dir="plain")
    compared = typed(f"bdpo compare {run} plain")
    assert "bdpo_alpha" in compared
    assert "Evaluation" in compared
    typed(f"bdpo plot {run} plain")

    shutil.rmtree(run)
    train("mine.yml")
    typed(f"bdpo recipes bundle {run} --to bundle")
    typed("bdpo recipes check bundle")
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    Path(home["HOME"]).mkdir()
    checked = typed("bdpo recipes check --run bundle", **home)
    assert "verified" in checked
    typed("bdpo recipes verify bundle --by a-tester", **home)
    (entry,) = find_recipe("bundle").about["verified"]
    assert entry["by"] == "a-tester"
    typed(f"bdpo recipes bundle {run}")
    assert "adapter_model" in typed(f"bdpo recipes publish {run} --repo me/model")
    assert "None" not in (run / "README.md").read_text()
    assert {*os.listdir(home["HOME"])} <= {"cache", ".config"}  # the latter is matplotlib's
