"""`rl: bdpo` alone, in interpreters of their own and on the real command line."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import cases
import pytest
import yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed"),
    pytest.mark.skipif(
        "bdpo_plugin" not in entry_points(group="torch.backends").names,
        reason="bdpo-plugin is not installed, only importable",
    ),
]

#: Who imports torch: the module to be wrapped itself, or somebody before it.
FIRST = {
    "half imported": "from axolotl.utils.config import validate_config",
    "torch first": "import torch; from axolotl.utils.config import validate_config",
    "the command": "from axolotl.cli.config import validate_config",
}

#: Validates the configurations of a file, one after the other, and prints what became of each.
VALIDATE = """
import json, sys
from axolotl.utils.dict import DictDefault
from axolotl.utils.config import prepare_plugins
from axolotl.integrations.base import PluginManager
for raw in json.load(open(sys.argv[1])):
    cfg = DictDefault(raw)
    try:
        prepare_plugins(cfg)
        cfg = validate_config(cfg)
        result = [cfg.rl.value, cfg.trainer_cls, list(cfg.plugins or [])]
    except ValueError as error:
        result = [type(error).__name__, str(error)]
    print("RESULT", json.dumps(result))
print("RESULT", json.dumps(list(PluginManager.get_instance().plugins)))
"""

TRAINER = "bdpo_plugin.hosts.axolotl.AxolotlBDPOTrainer"
PLUGIN = "bdpo_plugin.BDPOPlugin"


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    here = os.environ["PATH"]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{here}"} | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def validate(folder: Path, first: str, *configs: dict, **env: str) -> list:
    (folder / "configs.json").write_text(json.dumps(configs))
    done = run(folder, sys.executable, "-c", first + VALIDATE, "configs.json", **env)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("RESULT")) for line in lines if line.startswith("RESULT")]


@pytest.mark.parametrize("first", cases.first(1, FIRST))
def test_key_alone(first, config, tmp_path) -> None:
    alone, listed, plain, stray = (
        config(**keys).to_dict()
        for keys in (
            {"plugins": None, "bdpo_alpha": 0.5},
            {"plugins": [PLUGIN]},
            {"plugins": None, "rl": "dpo"},
            {"plugins": None, "rl": "dpo", "bdpo_alpha": 0.5},
        )
    )
    *results, plugins = validate(tmp_path, FIRST[first], plain, alone, listed, stray, plain)
    ours = ["dpo", TRAINER, [PLUGIN]]
    assert results[:3] == [["dpo", None, []], ours, ours]
    assert results[3][0] == "BDPOError"
    assert "`bdpo_alpha` has no effect with `rl: dpo`" in results[3][1]
    assert results[4] == ["dpo", None, []]
    assert plugins == [PLUGIN]


def test_switched_off(config, tmp_path) -> None:
    alone, listed = config(plugins=None).to_dict(), config().to_dict()
    results = validate(tmp_path, FIRST["the command"], alone, listed, BDPO_AUTOLOAD="0")
    assert results[0][0] == "ValidationError"
    assert "rl\n" in results[0][1]
    assert "input_value='bdpo'" in results[0][1]
    assert results[1] == ["dpo", TRAINER, [PLUGIN]]


@pytest.mark.parametrize(
    ("options", "env", "said"),
    [
        # arrives, or its value could not be refused
        (["--bdpo-alpha=-1"], {}, "`bdpo_alpha: -1` cannot be used"),
        pytest.param(
            ["--bdpo-alhpa", "1", "--launcher", "python"],
            {},
            "Did you mean `bdpo_alpha`?",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["--bdpo-alpha", "1", "--launcher", "python"],
            {"BDPO_AUTOLOAD": "0"},
            "Axolotl does not know `--bdpo-alpha` and drops it",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_option(options, env, said, config, tmp_path) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(config().to_dict()))
    done = run(tmp_path, "axolotl", "train", "run.yml", *options, **env)
    assert done.returncode != 0
    assert said in done.stdout


def test_option_of_a_switch_and_one_line_that_says_so(config, tiny, tmp_path) -> None:
    raw = config(**tiny, plugins=None).to_dict()
    (tmp_path / "run.yml").write_text(yaml.safe_dump(raw))
    done = run(tmp_path, "axolotl", "preprocess", "run.yml", "--no-bdpo-scaling")
    assert done.returncode == 0, done.stdout
    (line,) = [x for x in done.stdout.splitlines() if "`rl: bdpo` resolved to `rl: dpo`" in x]
    assert "bdpo_alpha: 1.5" in line
    assert "bdpo_scaling: False" in line


#: Builds, but does not run, a trainer for each argument: `dpo`, or an alpha.
BUILD = """
import json, sys
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
base = json.load(open("run.json"))
for kind in sys.argv[1:]:
    keys = {"rl": "dpo"} if kind == "dpo" else {"rl": "bdpo", "bdpo_alpha": float(kind)}
    cfg = load_cfg(DictDefault(base | keys))
    trainer = setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0]
    alpha = trainer.args.bdpo_alpha if kind != "dpo" else None
    print("RESULT", json.dumps([type(trainer).__name__, alpha, trainer.dataset_tags]))
"""


@pytest.mark.exhaustive
def test_one_process_after_the_other(config, tiny, tmp_path) -> None:
    order = ("dpo", "0.5", "dpo", "0.25")
    lora = {"adapter": "lora", "lora_r": 2, "lora_alpha": 2, "lora_target_linear": True}
    raw = config(**tiny, **lora, plugins=None, fp16=False, optimizer="adamw_torch").to_dict()
    (tmp_path / "run.json").write_text(json.dumps(raw))
    done = run(tmp_path, sys.executable, "-c", BUILD, *order)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    tags = [tiny["datasets"][0]["path"]]
    assert [json.loads(line.removeprefix("RESULT")) for line in lines] == [
        ["AxolotlDPOTrainer", None, tags]
        if kind == "dpo"
        else ["AxolotlBDPOTrainer", float(kind), tags]
        for kind in order
    ]
