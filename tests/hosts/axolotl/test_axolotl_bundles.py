"""A bundle of a run of Axolotl, the first steps of it again, and what would be uploaded of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl_runs import axolotl, server, write_config
from commandline import bdpo
from fake_hub import FakeHub
from guarded import nothing_but
from real_runs import make_tiny, run_command

from bdpo_plugin.cli.recipes.first_steps import prepare
from bdpo_plugin.recipes.expected import compare
from bdpo_plugin.recipes.recipe_file import find_recipe

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "a1B2" * 8
#: What `bdpo recipes check --run` starts, several in one process; each ends as a process does.
SCRIPT = """
import os
import sys
import tempfile
import yaml
from axolotl.cli.train import do_cli

for config in sys.argv[1:]:
    with open(config) as file:
        os.environ["BDPO_FIRST_STEPS_IN"] = yaml.safe_load(file)["output_dir"]
    try:
        do_cli(config)
    except SystemExit as end:
        assert not end.code
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny model and its data, a run, and the bundle of that, run/recipe."""
    folder = tmp_path_factory.mktemp("place")
    make_tiny(folder / "tiny")
    before = Path.cwd()
    os.chdir(folder)
    try:
        secret = f"https://me:{TOKEN}@mlflow.corp.internal/x"
        config = write_config(
            folder / "mine.yml",
            Path("tiny"),
            max_steps=6,
            save_strategy="steps",
            saves_per_epoch=None,
            save_steps=6,
            output_dir=str(folder / "run"),  # an absolute path, which is to become a relative one
            dataset_prepared_path="./prepared",
            bdpo_cache_dir="./scores",
            lora_dropout=0.1,
            wandb_entity=TOKEN,
            hf_use_auth_token=True,
            storage={"key": TOKEN, "notes": [["mail me@example.com"]]},
            mlflow_tracking_uri=secret,
            trl={"beta": 0.1, "note": TOKEN},
            bdpo_recipe={
                "author": "Me <me@example.com>",
                "data": {"command": "bdpo tiny tiny"},
            },
        )
        config.write_text(f"# of {TOKEN}\n{config.read_text()}")
        axolotl("train", config, "--launcher", "python", "--bdpo-alpha", "2")
        code, shown = bdpo("recipes", "bundle", "run")
        assert code == 0, shown
        assert "wrong" not in shown
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place / "run" / "recipe"


def test_what_is_in_it(here, place) -> None:
    assert {path.name for path in here.iterdir()} == {
        *("recipe.yml", "run.json", "log.json", "mi.json", "scores.parquet"),
        *("curves.png", "mi_scatter.png"),
    }
    recipe = find_recipe(str(here))
    assert recipe.config["output_dir"] == "./run"
    assert recipe.config["bdpo_alpha"] == 2  # of the command line
    assert not {"wandb_entity", "storage", "mlflow_tracking_uri"} & set(recipe.config)
    assert recipe.config["trl"] == {"beta": 0.1}
    assert recipe.config["hf_use_auth_token"] is True
    about = recipe.about
    assert about["data"] == {"command": "bdpo tiny tiny"}
    assert "author" not in about
    assert re.fullmatch("[0-9a-f]{32}", about["expected"]["null_prompt"])
    assert (about["processes"], about["batch"], about["expected"]["pairs"]) == (1, 4, 32)
    assert about["expected"]["settings"]["bdpo_alpha"] == 2
    assert list(about["expected"]["losses"]) == [1, 2, 3, 4, 5, 6]
    assert about["expected"]["losses"][1] == pytest.approx(0.6931, abs=1e-4)
    assert about["measured"]["hardware"] == "1 x CPU"
    assert about["measured"]["minutes"] > 0
    assert 0 < about["measured"]["memory_gib"] < 60
    assert about["versions"]["axolotl"] == "0.19.0"
    code, shown = bdpo("recipes", "check", str(here))
    assert code == 0, shown


def test_no_prompt_and_no_answer_is_in_it_unless_asked(here, place) -> None:
    rows = [json.loads(line) for line in (place / "tiny/train.jsonl").read_text().splitlines()]
    texts = {m["content"] for row in rows for m in row["messages"]}
    texts |= {row[side]["content"] for row in rows for side in ("chosen", "rejected")}
    assert min(map(len, texts)) > 8
    for path in here.iterdir():
        content = path.read_bytes()
        assert not [text for text in texts if text.encode() in content], path
        assert not [s for s in (TOKEN, "example.com", "corp.internal") if s.encode() in content]
        assert b"<|im_start|>" not in content, path  # the null prompt
        assert str(place).encode() not in content
    code, shown = bdpo("recipes", "bundle", "run", "--to", "with", "--with-texts")
    assert code == 0, shown
    assert (place / "with/train.jsonl").read_text() == (place / "tiny/train.jsonl").read_text()
    assert "<|im_start|>" in find_recipe("with").about["expected"]["null_prompt"]
    assert "<|im_start|>" in json.loads(Path("with/run.json").read_text())["null_prompt"]["text"]
    code, shown = bdpo("recipes", "bundle", "run")
    assert code == 1
    assert "is there already" in shown


def test_a_run_that_is_none_of_ours(tmp_path) -> None:
    code, shown = bdpo("recipes", "bundle", str(tmp_path))
    assert code == 1
    assert "run.json cannot be read" in shown


@pytest.fixture(scope="module")
def again(place, tmp_path_factory):
    """Change of a copy of the bundle -> what differs, by the first steps of all in one process."""
    folder = tmp_path_factory.mktemp("again")
    rows = (place / "tiny/train.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(rows[5])
    row["chosen"]["content"] += " Indeed."
    rows[5] = json.dumps(row) + "\n"
    changes = {
        "nothing": {},
        "seed": {"seed": 1},
        "alpha": {"bdpo_alpha": 1.0},
        "row": {"datasets": [{"path": "./other.jsonl", "ds_type": "json"}]},
        "rate": {"learning_rate": 1e-1},
    }
    before = Path.cwd()
    os.chdir(place)
    try:
        (place / "other.jsonl").write_text("".join(rows))
        recipes, files = {}, []
        for name, change in changes.items():
            shutil.copytree(place / "run/recipe", folder / name)
            file = folder / name / "recipe.yml"
            recipe = yaml.safe_load(file.read_text())
            if "datasets" in change:
                change = {"datasets": [{**recipe["datasets"][0], **change["datasets"][0]}]}
            file.write_text(yaml.safe_dump({**recipe, **change}))
            recipes[name] = find_recipe(str(folder / name))
            (folder / name / "trial").mkdir()
            command, environment = prepare(recipes[name], folder / name / "trial", ())
            assert command[0].endswith("axolotl")
            files.append(command[2])
        assert environment["BDPO_FIRST_STEPS"] == "6"
        steps = {"BDPO_FIRST_STEPS": "4"}
        run_command(["python", "-c", SCRIPT, *files], steps, server())
    finally:
        os.chdir(before)
    return {n: list(compare(r, folder / n / "trial/run")) for n, r in recipes.items()}


def differs(found) -> dict[str, str]:
    return {where: what for wrong, where, what in found if wrong}


def test_the_same_is_the_same(again) -> None:
    # four of the six steps were run: the two that are missing are told
    assert list(differs(again["nothing"])) == ["`losses`"]
    what = differs(again["nothing"])["`losses`"]
    assert "nan here" in what
    assert "step 5" in what
    assert "step 4" not in what


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ("seed", "`seed`", "1 here, 0 expected"),
        ("alpha", "`bdpo_alpha`", "1.0 here, 2.0 expected"),
        ("row", "`rows`", "the first that differs is row "),
        ("rate", "`losses`", "at step 3"),
    ],
)
def test_what_differs_is_named(again, change, where, words) -> None:
    assert words in differs(again[change])[where]
    if change == "row":
        assert "`seed`" not in differs(again[change])


def cold(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from bdpo_plugin.cli import main; main()", *arguments]
    options = {"capture_output": True, "text": True, "check": False, "cwd": cwd}
    return subprocess.run(command, env={**os.environ, **environment}, **options)


#: What a recipe of somebody's may ask for, and its check goes without.
ASKED = {
    "hub_model_id": "someone/model",
    "hub_strategy": "every_save",
    "save_strategy": "steps",
    "push_dataset_to_hub": "someone/data",
    "hf_use_auth_token": True,
    "save_first_step": True,
    "use_wandb": True,
    "wandb_project": "a-project",
    "use_tensorboard": True,
    "use_mlflow": True,
    "mlflow_experiment_name": "an-experiment",
    "use_trackio": True,
    "use_otel_metrics": True,
    "profiler_steps": 2,
    "use_ray": True,
}


@pytest.fixture
def short_folder():
    """Processes talk through sockets in the temporary folder, whose paths must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_passes_elsewhere_by_the_command_itself(place, short_folder, monkeypatch) -> None:
    """In another folder, with no store of scores, and the recipe renamed. It asks for all that
    leaves a machine, and nothing does; the folder of the steps is gone."""
    there = short_folder
    shutil.copytree(place / "tiny", there / "here" / "tiny")
    recipe = yaml.safe_load((place / "run/recipe/recipe.yml").read_text())
    (there / "here" / "theirs.yml").write_text(yaml.safe_dump(recipe | ASKED))
    asked = ("recipes", "check", "theirs.yml", "--run", "--json", "--", "--launcher", "python")
    with nothing_but(there, monkeypatch=monkeypatch):
        done = cold(*asked, cwd=there / "here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f for f in json.loads(done.stdout)["findings"] if f["wrong"]] == []


# --- publish ------------------------------------------------------------------------------------


def test_publish_says_what_would_be_uploaded(here, place) -> None:
    code, shown = bdpo("recipes", "publish", "run")
    assert code == 0, shown
    assert "Nothing was uploaded" in shown
    listed = {line.split()[1] for line in shown.splitlines() if line.strip()[:1].isdigit()}
    assert {"README.md", "adapter_model.safetensors", "recipe/recipe.yml"} <= listed
    assert not [n for n in listed if "checkpoint" in n or "optimizer" in n or n == "debug.log"]
    assert "model.safetensors" not in listed  # the base model's
    card = (place / "run" / "README.md").read_text()
    assert not [s for s in (TOKEN, "example.com", "corp.internal") if s in card]
    assert "![Mutual information of the pairs](./mi_scatter.png)" in card


def test_what_the_run_itself_wrote_has_no_secret(place) -> None:
    """A host's push uploads the whole folder, before anybody looks."""
    written = [place / "run" / name for name in ("README.md", "bdpo/recipe.yml", "bdpo/run.json")]
    for file in written:
        text = file.read_text()
        assert not [s for s in (TOKEN, "example.com", "corp.internal", str(place)) if s in text], (
            file
        )
    assert "#" not in written[1].read_text()
    recorded = yaml.safe_load(written[1].read_text())
    order = list(yaml.safe_load((place / "mine.yml").read_text()))
    assert [key for key in recorded if key in order] == [key for key in order if key in recorded]
    assert list(recorded)[-1] == "bdpo_alpha"  # of the command line


def test_publish_refuses_a_token_in_the_card(here, place) -> None:
    card = place / "run" / "README.md"
    text = card.read_text()
    try:
        card.write_text(text.replace("\n## B-DPO", f"\nlogin with {TOKEN}\n\n## B-DPO"))
        code, shown = bdpo("recipes", "publish", "run", "--repo", "me/model", "--push")
    finally:
        card.write_text(text)
    assert code == 1
    assert "README.md, line" in shown
    assert "nothing was uploaded" in shown


def test_publish_uploads_just_that(here, place) -> None:
    with FakeHub() as hub:
        asked = ("recipes", "publish", "run", "--repo", "me/model", "--push")
        done = cold(*asked, cwd=place, **hub.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.strip()[:1].isdigit()}
    assert hub.uploaded == listed
    assert hub.tokens == {"Bearer hf_of_the_test"}
