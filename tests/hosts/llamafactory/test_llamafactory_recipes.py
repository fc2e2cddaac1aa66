"""The recipes: what LLaMA-Factory says of each, and a short run with little in its place."""

import json

import pytest

pytest.importorskip("llamafactory")

from cases import first
from commandline import bdpo
from llamafactory_runs import scores, train

from bdpo_plugin.cli.recipes.first_steps import prepare
from bdpo_plugin.recipes.expected import compare
from bdpo_plugin.recipes.recipe_file import find_recipe, read_recipe, recipe_files, recipe_root

FILES = {n: p for n, p in recipe_files(recipe_root()).items() if n.startswith("llamafactory/")}

#: All that is changed of a recipe, beside the model, the data and where it writes: one step of two
#: pairs on a CPU, without flash-attention, and not shared among processes.
SMALL = {
    "max_steps": 1,
    "max_samples": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_size": 0.0,
    "eval_dataset": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "flash_attn": "sdpa",
    "deepspeed": None,
    "plot_loss": False,
    "report_to": "none",
    "preprocessing_num_workers": 1,
}


@pytest.mark.parametrize("name", FILES)
def test_check_finds_nothing_wrong(name):
    code, shown = bdpo("recipes", "check", name)
    assert code == 0, shown
    assert "nothing wrong" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", first(3, FILES))
def test_runs(name, tiny, tmp_path):
    from llamafactory.train.tuner import run_exp

    config = read_recipe(FILES[name], name).config
    places = {
        "model_name_or_path": str(tiny / "model"),
        "dataset_dir": str(tiny),
        "dataset": "train",
        "output_dir": str(tmp_path / "run"),
        "bdpo_cache_dir": str(tmp_path / "scores"),
    }
    changed = {**config, **places, **SMALL, "bdpo_recipe": {"title": name}}
    if "bit" in config.get("optim", ""):  # has no kernel for CPUs
        changed["optim"] = "adamw_torch"
    run_exp({key: value for key, value in changed.items() if value is not None})
    record = json.loads((tmp_path / "run" / "bdpo" / "run.json").read_text())
    assert record["pairs"] == len(scores(tmp_path / "run")["row"]) == 8
    adapter = (tmp_path / "run" / "adapter_config.json").is_file()
    assert adapter == (not name.endswith("-full"))
    assert record["quantised"] == name.endswith("-qlora")
    assert record["settings"]["bdpo_alpha"] == 1.5
    written = read_recipe(tmp_path / "run" / "bdpo" / "recipe.yml", name)
    assert written.about == {"title": name}


@pytest.mark.slow
def test_the_bundle_of_a_run_and_its_first_steps_again(tiny, tmp_path, monkeypatch):
    """A run by the command, its bundle, and the same once more; then with another learning rate."""
    from llamafactory.train.tuner import run_exp

    monkeypatch.chdir(tmp_path)
    train(
        tiny, tmp_path / "run", save_strategy="steps", save_steps=3, bdpo_recipe={"title": "Mine"}
    )
    code, shown = bdpo("recipes", "bundle", "run")
    assert code == 0, shown
    recipe = find_recipe("run/recipe")
    assert recipe.config["output_dir"] == "./run"
    assert recipe.about["title"] == "Mine"
    assert list(recipe.about["expected"]["losses"]) == [1, 2, 3]
    # the data and the model are where they were
    recipe.config.update(dataset_dir=str(tiny), model_name_or_path=str(tiny / "model"))
    for name, rate in (("same", recipe.config["learning_rate"]), ("other", 0.1)):
        recipe.config["learning_rate"] = rate
        (tmp_path / name).mkdir()
        command, environment = prepare(recipe, tmp_path / name, ())
        assert command[0].endswith("llamafactory-cli")
        for variable in ("BDPO_FIRST_STEPS", "BDPO_FIRST_STEPS_IN"):
            monkeypatch.setenv(variable, environment[variable])
        with pytest.raises(SystemExit) as ended:
            run_exp(read_recipe(tmp_path / name / "recipe.yml", name).config)
        assert ended.value.code == 0
        wrong = [f.where for f in compare(recipe, tmp_path / name / "run") if f.wrong]
        assert wrong == ([] if name == "same" else ["`losses`"])
