"""`bdpo plot`, `bdpo compare` and `bdpo answers` on what real runs leave behind."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from commandline import bdpo
from recorded_run import recorded_run
from running import history, pairs, scores, trainer
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from bdpo_plugin.cli.load_trained import load_trained
from bdpo_plugin.demo.tiny import write
from bdpo_plugin.output.run_folder import read_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"), steps=0, hidden_size=32, layers=1, progress=False)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A finished B-DPO run with LoRA and evaluation, and a full fine-tune with plain DPO."""
    root = tmp_path_factory.mktemp("runs")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    finished = {}
    for name, extra in {
        "bdpo": {
            "evaluation": pairs(8, split="eval"),
            "eval_strategy": "steps",
            "eval_steps": 2,
            "bdpo_cache_dir": str(root / "cache"),
        },
        "dpo": {"cls": DPOTrainer, "lora": False},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(base / "model")
        run = trainer(output_dir=root / name, model=model, **options, **extra)
        run.train()
        run.save_model()
        finished[name] = run
    return finished, root


def assert_drawn(path) -> None:
    picture = matplotlib.image.imread(path)[..., :3]
    height, width, _ = picture.shape
    assert min(height, width) > 400
    inked = (picture < 0.9).any(axis=-1)
    assert 0.005 < inked.mean() < 0.5
    # something in each quarter of the picture, and more than greys
    for rows in (slice(None, height // 2), slice(height // 2, None)):
        for columns in (slice(None, width // 2), slice(width // 2, None)):
            assert inked[rows, columns].any()
    assert (picture.max(axis=-1) - picture.min(axis=-1)).max() > 0.3


def test_plot_one_run(runs, tmp_path) -> None:
    _, root = runs
    code, shown = bdpo("plot", str(root / "bdpo"), "--out", str(tmp_path / "new" / "folder"))
    assert code == 0, shown
    for name in ("curves.png", "mi_scatter.png"):
        assert str(tmp_path / "new" / "folder" / name) in shown
        assert_drawn(tmp_path / "new" / "folder" / name)


def test_plot_draws_the_runs_own_numbers(runs) -> None:
    finished, root = runs
    run = read_run(root / "bdpo", "bdpo")
    for key in ("loss", "rewards/margins", "eval_loss"):
        assert [e[key] for e in run.log if key in e] == history(finished["bdpo"], key)
    assert run.scores.to_pydict() == scores(root / "bdpo")
    assert read_run(root / "dpo", "dpo").scores is None


def test_plot_lays_several_runs_over_each_other(runs, tmp_path) -> None:
    _, root = runs
    code, shown = bdpo("plot", str(root / "bdpo"), "--out", str(tmp_path / "one"))
    assert code == 0, shown
    directories = [str(root / name) for name in ("bdpo", "dpo")]
    code, shown = bdpo("plot", *directories, "--out", str(tmp_path / "two"))
    assert code == 0, shown
    one, two = (
        matplotlib.image.imread(tmp_path / n / "curves.png")[..., :3] for n in ("one", "two")
    )

    assert has(ORANGE, two)
    assert not has(ORANGE, one)


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)  # the colours of the first two runs


def has(colour, picture) -> bool:
    return bool((abs(picture - np.array(colour) / 255).max(axis=-1) < 0.02).any())


def test_curves_that_coincide_are_told_apart_on_axes_that_show_them(runs, tmp_path) -> None:
    curves = import_module("bdpo_plugin.cli.training_curves")
    run = read_run(runs[1] / "bdpo", "a")
    log = [{"step": step, "loss": 0.5 + 0.001 * step} for step in range(1, 41)]
    log[9]["loss"] = float("nan")
    curves.curves([run._replace(log=log, scores=None)] * 2, tmp_path / "same.png")
    picture = matplotlib.image.imread(tmp_path / "same.png")[..., :3]
    drawn = picture[: len(picture) * 3 // 4]  # above the legend
    assert has(BLUE, drawn)
    assert has(ORANGE, drawn)

    figure, axis = matplotlib.pyplot.subplots()
    curves._draw_curves(axis, [run._replace(log=log)], "loss", {})
    low, high = axis.get_ylim()
    matplotlib.pyplot.close(figure)
    assert 0.49 < low < 0.501
    assert 0.54 < high < 0.55


def test_a_picture_has_at_most_eight_panels(runs, tmp_path, monkeypatch) -> None:
    for name in "abcdefghij":
        shutil.copytree(runs[1] / "bdpo", tmp_path / name)
    drawn = []
    monkeypatch.setattr("bdpo_plugin.cli.training_curves.curves", lambda runs, path: path)
    monkeypatch.setattr(
        "bdpo_plugin.cli.mi_figures.mi_scatter", lambda runs, path: drawn.extend(runs)
    )
    code, shown = bdpo("plot", *(str(tmp_path / name) for name in "abcdefghij"))
    assert code == 0, shown
    assert [name for name, _ in drawn] == list("abcdefgh")
    assert "mi_scatter.png has 8 panels, without: i, j" in shown


def test_plot_of_plain_dpo_says_why_there_is_no_scatter(runs, tmp_path) -> None:
    _, root = runs
    code, shown = bdpo("plot", str(root / "dpo"), "--out", str(tmp_path))
    assert code == 0
    assert "not a B-DPO run" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_plot_reads_the_last_checkpoint(runs, tmp_path) -> None:
    finished, root = runs
    shutil.copytree(root / "bdpo", tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-10")
    loss = [e["loss"] for e in read_run(tmp_path / "run", "run").log if "loss" in e]
    assert loss == history(finished["bdpo"], "loss")


def test_plot_of_a_run_without_a_log(runs, tmp_path) -> None:
    code, shown = bdpo("plot", str(tmp_path))
    assert code == 1
    assert f"{tmp_path} has no trainer_state.json" in shown
    assert "saves_per_epoch: 1" in shown


def compared(*directories) -> dict:
    code, shown = bdpo("compare", *map(str, directories), "--json")
    assert code == 0, shown
    return json.loads(shown)


def test_compare(runs) -> None:
    finished, root = runs
    said = compared(root / "bdpo", root / "dpo")
    # what only one of them records is not compared
    assert said["settings"] == {"method": ["B-DPO, alpha 1.5", "DPO"], "adapter": ["LORA", "none"]}
    assert said["notes"] == []
    for name, run in finished.items():
        whole, training = (said["figures"][name][part] for part in ("the run", "training"))
        assert whole["steps"] == 4
        assert whole["highest learning rate"] == max(history(run, "learning_rate"))
        assert training["loss"] == history(run, "loss")[-1]
        fell = max(history(run, f"rewards/{side}")[-1] for side in ("chosen", "rejected")) < 0
        assert training["both rewards fell"] is fell
    evaluated = said["figures"]["bdpo"]["evaluation"]
    assert evaluated["loss"] == history(finished["bdpo"], "eval_loss")[-1]
    assert said["figures"]["bdpo"]["the run"]["training pairs"] == 24
    assert "training pairs" not in said["figures"]["dpo"]["the run"]

    code, shown = bdpo("compare", str(root / "bdpo"), str(root / "dpo"))
    assert code == 0
    for words in ("Settings that differ", "method", "Training", "Evaluation", "both rewards fell"):
        assert words in shown


def recorded(folder: Path, host: str = "axolotl", recipe: str = "", **record) -> Path:
    """The folder of a run with an adapter."""
    recorded_run(folder, recipe)
    file = folder / "bdpo" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": host} | record))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return folder


def plain(folder: Path) -> Path:
    """The folder of a run of a host's own DPO, with an adapter."""
    shutil.rmtree(recorded(folder) / "bdpo")
    return folder


def test_settings_are_compared_among_the_runs_that_record_them(tmp_path) -> None:
    base = "base_model: a\n"
    one = recorded(tmp_path / "one", recipe=f"{base}lora_dropout: 0.1\nbdpo_alpha: 1.5\n")
    two = recorded(tmp_path / "two", recipe=base, seed=2)
    other = recorded(tmp_path / "other", "llamafactory", "model_name_or_path: a\n")
    dpo = plain(tmp_path / "dpo")
    assert compared(one, two, other, dpo)["settings"] == {
        "method": [*["B-DPO, alpha 1.5"] * 3, "DPO"],
        "host": ["axolotl", "axolotl", "llamafactory", None],
        "seed": [1, 2, 1, None],
        "lora_dropout": [0.1, "(not set)", None, None],  # of Axolotl's two configurations
    }


def test_the_baseline_of_an_adapter_in_axolotl(tmp_path) -> None:
    """Axolotl leaves the adapter of its own DPO to chance; LLaMA-Factory and TRL do not."""
    ours, dpo = recorded(tmp_path / "ours"), plain(tmp_path / "dpo")
    (note,) = compared(ours, dpo)["notes"]
    assert note.startswith("dpo: Axolotl does not seed a new adapter")
    assert "`bdpo_alpha: 0`" in note
    code, shown = bdpo("compare", str(ours), str(dpo))
    assert code == 0
    assert "note: dpo: Axolotl does not seed" in shown
    assert compared(ours, recorded(tmp_path / "more"))["notes"] == []
    assert compared(recorded(tmp_path / "other", "llamafactory"), dpo)["notes"] == []
    (dpo / "adapter_config.json").unlink()
    assert compared(ours, dpo)["notes"] == []


def test_each_evaluation_set_by_its_name(runs, tmp_path) -> None:
    """Its name is in some keys of a log, and the rewards have none: the set is that of the entry.
    One name begins as another one does."""
    _, root = runs
    shutil.copytree(root / "bdpo", tmp_path / "run")
    for file in (tmp_path / "run").rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        others = [entry for entry in state["log_history"] if "eval_loss" not in entry]
        for step in (2, 4):
            for i, name in enumerate(("safe", "safe_long", "loss")):
                entry = {f"eval_{name}_{key}": step + i for key in ("loss", "runtime")}
                entry |= {"eval_rewards/margins": 10 * step + i, "step": step}
                entry |= {"eval_rewards/chosen": i - 1, "eval_rewards/rejected": -2}
                others.append(entry)
        file.write_text(json.dumps({**state, "log_history": others}))
    figures = compared(tmp_path / "run")["figures"]["run"]
    for i, name in enumerate(("safe", "safe_long", "loss")):
        assert figures[f"evaluation of {name}"] == {
            "loss": 4 + i,
            "reward margin": 40 + i,
            "reward of chosen": i - 1,
            "reward of rejected": -2,
            "both rewards fell": i == 0,
        }
    assert "evaluation" not in figures
    code, shown = bdpo("plot", str(tmp_path / "run"), "--out", str(tmp_path / "drawn"))
    assert code == 0, shown
    assert_drawn(tmp_path / "drawn" / "curves.png")


def test_compare_a_run_with_itself(runs) -> None:
    _, root = runs
    code, shown = bdpo("compare", *[str(root / "bdpo")] * 2)
    assert code == 0
    assert "No setting that these runs record differs" in shown


def test_settings_are_those_of_the_run_and_name_no_account(runs, tmp_path) -> None:
    _, root = runs
    shutil.copytree(root / "bdpo", tmp_path / "run")
    recipe = tmp_path / "run" / "bdpo" / "recipe.yml"
    recipe.write_text(
        "learning_rate: 0.5\nhub_token: hf_x\noutput_dir: /x\n"
        "trl: {beta: 3}\nmax_memory: {0: 9GB}\n"
        "bdpo_recipe: {title: a title, expected: {losses: {1: 0.7}}}\n"
    )
    settings = read_run(tmp_path / "run", "run").settings
    assert set(settings) == {"trainer", "adapter", "bdpo", "trl"}
    assert settings["trainer"]["max_steps"] == 4
    assert settings["adapter"]["r"] == 4
    assert settings["bdpo"]["bdpo_weighting"] == "softmax"
    found = {name: value for of in settings.values() for name, value in of.items()}
    assert found["target_modules"] == sorted(found["target_modules"])
    assert (found["learning_rate"], found["trl.beta"], found["max_memory.0"]) == (0.5, 3, "9GB")
    assert not [name for name in found if name.startswith("bdpo_recipe")]  # of another run
    assert "base_model_name_or_path" in found
    assert not {"hub_token", "output_dir"} & set(found)

    record = tmp_path / "run" / "bdpo" / "run.json"
    record.write_text(json.dumps({"train_runtime": 7.5, "seed": 3}))
    said = compared(root / "bdpo", tmp_path / "run")
    assert "train_runtime" not in said["settings"]
    assert said["settings"]["seed"] == [42, 3]
    assert said["figures"]["run"]["the run"]["seconds"] == 7.5

    recipe.write_text("a: b: c")
    code, shown = bdpo("compare", str(tmp_path / "run"))
    assert code == 1
    assert f"{recipe} cannot be read" in shown


@pytest.mark.parametrize("name", ["bdpo", "dpo"])
def test_answers(name, base, runs, tmp_path) -> None:
    _, root = runs
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do I [bold]bake[/bold] bread?\n\nHow do I pick a lock?\n")
    code, shown = bdpo(
        *("answers", str(base / "model"), str(root / name)),
        *("--prompts", str(prompts), "--max-new-tokens", "8"),
    )
    assert code == 0, shown
    for expected in ("Prompt", "Before", "After", "[bold]bake[/bold]", "pick a lock?"):
        assert expected in shown


def test_answers_of_an_adapter_and_of_the_model_it_is_merged_into(base, runs, tmp_path) -> None:
    _, root = runs
    load_trained(str(base / "model"), root / "bdpo").merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\nHow do I pick a lock?\n")
    code, shown = bdpo(
        *("answers", str(base / "model"), str(root / "bdpo"), str(tmp_path / "merged"), "--json"),
        *("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8"),
    )
    assert code == 0, shown
    said = json.loads(shown[shown.index("{") :])
    assert list(said) == ["Prompt", "Before", "bdpo", "merged"]
    assert said["Prompt"] == ["How do I bake bread?", "How do I pick a lock?"]
    assert said["bdpo"] == said["merged"]
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted, merged = (
        load_trained(str(base / "model"), folder)(ids).logits
        for folder in (root / "bdpo", tmp_path / "merged")
    )
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bdpo", "dpo"])
def test_the_after_column_is_the_trained_model(name, base, runs) -> None:
    finished, root = runs
    ids = torch.tensor([[5, 6, 7, 8]])
    before = AutoModelForCausalLM.from_pretrained(base / "model").eval()(ids).logits
    after = load_trained(str(base / "model"), root / name)(ids).logits
    with torch.no_grad():
        trained = finished[name].model.eval()(ids).logits
    torch.testing.assert_close(after, trained, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_an_adapter_goes_before_full_weights_beside_it(base, runs, tmp_path) -> None:
    finished, root = runs
    shutil.copytree(root / "bdpo", tmp_path / "run")
    for name in ("config.json", "model.safetensors"):  # as Axolotl leaves them
        shutil.copy(base / "model" / name, tmp_path / "run" / name)
    ids = torch.tensor([[5, 6, 7, 8]])
    after = load_trained(str(base / "model"), tmp_path / "run")(ids).logits
    with torch.no_grad():
        trained = finished["bdpo"].model.eval()(ids).logits
    torch.testing.assert_close(after, trained, rtol=1e-5, atol=1e-5)


def test_answers_of_a_folder_that_is_no_run(base, tmp_path) -> None:
    code, shown = bdpo(
        *("answers", str(base / "model"), str(tmp_path)),
        *("--prompts", str(base / "prompts.txt"), "--max-new-tokens", "1"),
    )
    assert code == 1
    assert "has neither adapter_config.json nor config.json" in shown


def test_answers_to_no_prompt(base, runs, tmp_path) -> None:
    _, root = runs
    (tmp_path / "prompts.txt").write_text("\n \n")
    code, shown = bdpo(
        *("answers", str(base / "model"), str(root / "bdpo")),
        *("--prompts", str(tmp_path / "prompts.txt")),
    )
    assert code == 1
    assert "has no prompt" in shown
