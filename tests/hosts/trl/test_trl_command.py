"""`bdpo train`, and what else reads its configurations: `bdpo mi` and `bdpo recipes`."""

import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from commandline import bdpo
from datasets import load_dataset
from doctor_runs import doctor, fixes
from real_runs import run_command
from running import scores
from safetensors.torch import load_file

from bdpo_plugin.cli.recipes.first_steps import prepare
from bdpo_plugin.demo.tiny import write
from bdpo_plugin.hosts.trl import side_effects
from bdpo_plugin.hosts.trl.arguments import _GROUPS, parse
from bdpo_plugin.hosts.trl.inspection import inspect
from bdpo_plugin.hosts.trl.loading import load_data, make_trainer
from bdpo_plugin.hosts.trl.tokenised import dataset_pairs
from bdpo_plugin.recipes.expected import compare
from bdpo_plugin.recipes.recipe_file import find_recipe, recipe_root
from bdpo_plugin.settings import BDPOError, BDPOSettings
from bdpo_plugin.training.score_columns import ROW

TINY = recipe_root() / "trl" / "tiny.yml"
TRAIN = Path("bdpo-demo", "tiny", "train.jsonl")
KEYS = yaml.safe_load(TINY.read_text(encoding="utf-8"))
#: Names of what leaves a machine, or is left on it.
SMELL = re.compile(r"hub_|push|report|trackio|resume|output_dir")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the recipe's paths are, with a model of little size."""
    folder = tmp_path_factory.mktemp("trl")
    options = {"hidden_size": 32, "layers": 1, "train_pairs": 32, "eval_pairs": 8}
    write(folder / "bdpo-demo" / "tiny", steps=0, progress=False, **options)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def write_config(path, **changes):
    keys = {k: v for k, v in {**KEYS, **changes}.items() if v is not None}
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_every_key_is_in_one_list():
    """Of the releases that are tested, whose transformers differ by two keys."""
    known = {f.name for group in _GROUPS for f in fields(group) if f.init}
    known -= set(BDPOSettings.keys())
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert known | newer == side_effects.KEYS - {"env"}
    groups = (side_effects.DROPPED, side_effects.SHARES, side_effects.OTHERS, side_effects.WRITES)
    assert sum(len(group) for group in groups) == len(side_effects.KEYS)
    assert not [key for key in side_effects.OTHERS if SMELL.search(key)]


def test_options_override_the_file_and_are_in_the_configuration():
    options = ["--beta", "0.2", "--bdpo-alpha=0.5", "--no_bdpo_scaling", "--eval_strategy", "no"]
    found = parse(KEYS, options)
    assert (found.training.beta, found.training.bdpo_alpha) == (0.2, 0.5)
    assert found.model.lora_target_modules == "all-linear"
    changed = {k: v for k, v in found.keys.items() if KEYS.get(k) != v}
    wanted = {"beta": 0.2, "bdpo_alpha": 0.5, "bdpo_scaling": False, "eval_strategy": "no"}
    assert changed == wanted


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"bdpo_alhpa": 1}, [], "Unknown key `bdpo_alhpa`. Did you mean `bdpo_alpha`?"),
        ({}, ["--learing_rate", "1"], "Unknown key `learing_rate`. Did you mean `learning_rate`?"),
        ({"num_processes": 2}, [], "`num_processes` is not read here: `bdpo train` is one process"),
        ({"beta": "high"}, [], "--beta: invalid float value: 'high'."),
        ({"bdpo_alpha": -1}, [], "`bdpo_alpha"),
        ({}, ["--dtype", "float3"], "--dtype: invalid choice: 'float3'"),
    ],
)
def test_keys_and_values_that_are_refused(changes, options, message):
    with pytest.raises(BDPOError) as refused:
        parse({**KEYS, **changes}, options)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400  # and no list of all options


FILE = "./bdpo-demo/tiny/train.jsonl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_split_size": None},
            "`datasets` (./bdpo-demo/tiny/train.jsonl) has no split `test`, only train, and "
            "`eval_strategy: epoch` needs pairs to evaluate on. Set `test_split_size: 0.05`, say",
        ),
        (
            {"datasets": None, "dataset_name": FILE},
            f"`dataset_name: {FILE}` has no split `test`, only train, and `eval_strategy: epoch` "
            "needs pairs to evaluate on. Set `dataset_test_split`",
        ),
        (
            {"datasets": None, "dataset_name": "./pears.jsonl"},
            "`dataset_name: ./pears.jsonl` could not be loaded: ",
        ),
        (
            {"datasets": None, "dataset_name": FILE, "dataset_train_split": "first"},
            "has no split `first`, only train: set `dataset_train_split`.",
        ),
        ({"model_name_or_path": "./none"}, "`model_name_or_path: ./none` is no model that can be"),
        ({"model_name_or_path": None, "base_model": "a"}, "call `axolotl train "),
        ({"datasets": None}, "names no data: set `dataset_name`, a data set of the hub or a file"),
        ({"datasets": None, "stage": "dpo"}, "call `llamafactory-cli train "),
    ],
)
def test_data_and_models_that_are_not_there(here, tmp_path, changes, message):
    code, shown = bdpo("train", write_config(tmp_path / "config.yml", **changes))
    assert code == 1
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_whole_way_of_a_recipe(here, tmp_path, monkeypatch):
    """Copied, measured, trained, resumed, bundled, checked, and its first steps run again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, shown = bdpo("recipes", "copy", "trl/tiny", str(tmp_path))
    assert code == 0
    assert f"Then: bdpo train {tmp_path / 'tiny.yml'}" in shown
    steps = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
    config = write_config(tmp_path / "config.yml", bdpo_cache_dir=None, **steps)
    code, shown = bdpo("mi", config, "--json", "--split", "imbalanced", "--fraction", "0.25")
    assert code == 0, shown
    result = json.loads(shown[shown.rindex('{\n "pairs"') :])
    assert result["pairs"] == 28
    whole = load_dataset("json", data_files=FILE, split="train").to_list()
    (subset,) = result["imbalanced"]
    assert len(lines := Path(subset).read_text().splitlines()) == 7
    assert all(json.loads(line) in whole for line in lines)

    code, shown = bdpo("train", config)
    assert code == 0, shown
    assert "28: 0 scored now, 28 reused" in shown
    run = here / "bdpo-demo" / "run-trl"
    assert scores(run) == scores(tmp_path / "bdpo-mi")
    trained = load_file(run / "adapter_model.safetensors")
    code, shown = bdpo("train", config, "--resume_from_checkpoint", str(run / "checkpoint-4"))
    assert code == 0, shown
    again = load_file(run / "adapter_model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in trained.items())
    assert "bdpo" in (run / "README.md").read_text()

    code, shown = bdpo("recipes", "bundle", str(run), "--to", str(tmp_path / "bundle"))
    assert code == 0, shown
    code, shown = bdpo("recipes", "check", str(tmp_path / "bundle"))
    assert code == 0, shown
    recipe = find_recipe(str(tmp_path / "bundle"))
    assert (recipe.host, recipe.method, recipe.batch) == ("trl", "lora", 4)
    assert "resume_from_checkpoint" not in recipe.config
    for name, rate in (("same", None), ("other", 0.1)):
        recipe.config["learning_rate"] = rate or recipe.config["learning_rate"]
        (tmp_path / name).mkdir()
        command, environment = prepare(recipe, tmp_path / name, ())
        assert command[0].endswith("bdpo")
        for variable in ("BDPO_FIRST_STEPS", "BDPO_FIRST_STEPS_IN"):
            monkeypatch.setenv(variable, environment[variable])
        assert bdpo(*command[1:])[0] == 0
        wrong = [f.where for f in compare(recipe, tmp_path / name / "run") if f.wrong]
        assert wrong == ([] if name == "same" else ["`losses`"])


def test_doctor_says_that_a_sound_configuration_is_sound(here, tmp_path):
    code, found, rows = doctor(write_config(tmp_path / "config.yml"))
    assert code == 0
    assert found["configuration"] == [("ok", "the host takes it, and its data")]
    assert found["pairs"][0] == ("ok", "28 of 28 can be trained on")  # the others evaluate
    first = json.loads(TRAIN.read_text().splitlines()[0])
    assert first["messages"][0]["content"] in rows[0]["prompt"]
    assert rows[0]["chosen"].startswith(first["chosen"]["content"])
    states = {name: [state for state, _ in several] for name, several in found.items()}
    for name in ("data", "length", "null prompt", "boundary", "batches", "cost"):
        assert states[name] == ["ok"], name


def test_doctor_looks_at_the_keys_the_model_and_the_data(here, tmp_path):
    def failed(**changes):
        code, found, _ = doctor(write_config(tmp_path / "config.yml", **changes))
        assert code == 1
        return [w for several in found.values() for state, w in several if state == "failed"]

    assert "`bdpo_alpha" in failed(bdpo_alpha=-1)[0]
    assert "`model_name_or_path: ./none` is no model" in failed(model_name_or_path="./none")[0]
    assert "could not be loaded" in failed(datasets=None, dataset_name="./none")[0]
    (words,) = failed(bdpo_control="shuffled:kind")
    assert "`bdpo_control: shuffled:kind`" in words

    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"]["content"] *= 40
    given = tmp_path / "pairs.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path / "config.yml", datasets=None, dataset_name=str(given), eval_strategy="no"
    )
    code, found, _ = doctor(config)
    assert code == 0
    assert found["pairs"][0][0] == "warning"
    assert "rows 1" in found["pairs"][0][1]
    assert found["length"][0][0] == "warning"
    assert fixes(config)["length"].startswith("max_length: ")
    without = [{k: v for k, v in row.items() if k != "rejected"} for row in rows]
    given.write_text("".join(json.dumps(row) + "\n" for row in without))
    code, found, _ = doctor(config)
    assert code == 1
    assert "rejected" in found["configuration"][0][1]


@pytest.mark.parametrize("as_text", [False, True], ids=["messages", "text"])
@pytest.mark.parametrize("changes", [{}, {"max_length": 30}])
def test_doctor_reads_the_pairs_that_a_run_trains_on(here, tmp_path, changes, as_text):
    """In text without a white space between them, tokens of prompt and response may merge."""
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    if as_text:
        sides = ("chosen", "rejected")
        rows = [
            {"prompt": row["messages"][0]["content"]} | {s: row[s]["content"] for s in sides}
            for row in rows
        ]
    given = tmp_path / "pairs.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {**KEYS, "dataset_name": str(given), "eval_strategy": "no", **changes}
    keys = {k: v for k, v in keys.items() if k != "datasets"}
    keys |= {"bdpo_null_prompt": "?", "bdpo_cache_dir": str(tmp_path / "scores")}
    inspected = inspect(keys)
    arguments = parse({k: v for k, v in keys.items() if k != "bdpo_recipe"})
    arguments.training.output_dir = str(tmp_path / "run")
    trainer = make_trainer(arguments, load_data(arguments))
    trained = dataset_pairs(trainer.train_dataset, trainer.data_collator.collator)
    numbers = dict(zip(inspected.names, inspected.pairs, strict=True))
    assert len(trained) > 10
    for row, pair in zip(trainer.train_dataset[ROW], trained, strict=True):
        for side, ours in zip(pair, numbers[row], strict=True):
            assert side.prompt_ids.tolist() == ours.prompt_ids.tolist()
            assert side.completion_ids.tolist() == ours.completion_ids.tolist()


@pytest.mark.parametrize("changes", [{}, {"load_in_4bit": True, "use_peft": False}])
def test_check_validates_by_trls_parser(tmp_path, changes):
    code, shown = bdpo("recipes", "check", write_config(tmp_path / "config.yml", **changes))
    assert code == 0, shown
    broken = write_config(tmp_path / "broken.yml", padding_free=True, lerning_rate=1)
    code, shown = bdpo("recipes", "check", broken)
    assert code == 1
    assert "wrong: trl: Unknown key `lerning_rate`. Did you mean `learning_rate`?" in shown
    assert "`padding_free" in shown


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_train_as_one(here, tmp_path):
    """By the command of docs/several-gpus.md. A step of both has the pairs of a step of one."""
    cpu = "--cpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    for processes, pairs in ((1, 16), (2, 8)):
        config = write_config(
            tmp_path / f"{processes}.yml",
            bdpo_cache_dir=str(tmp_path / f"scores-{processes}"),
            output_dir=str(tmp_path / str(processes)),
            per_device_train_batch_size=pairs,
            lora_dropout=0.0,
            eval_strategy="no",
            logging_steps=1,
            max_steps=1,
        )
        command = shutil.which("bdpo", path=Path(sys.executable).parent)
        words = f"accelerate launch {cpu} --num_processes {processes} {command} train {config}"
        run_command(words.split(), {"OMP_NUM_THREADS": "1"})
    one, two = (scores(tmp_path / name) for name in "12")
    assert two["row"] == one["row"]
    assert two["mi_chosen"] == pytest.approx(one["mi_chosen"], abs=1e-4)
    losses = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0]["loss"]
        for name in "12"
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
