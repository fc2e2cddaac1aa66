"""`bdpo recipes bundle` and `publish`: what they refuse, by key and line, and what is left then."""

import json
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commandline import bdpo
from recorded_run import NULL_PROMPT, recorded_run

TOKEN = "hf_" + "a1B2" * 8
RECIPE = """\
base_model: Qwen/Qwen2-7B-Instruct
rl: bdpo
datasets: [{path: some/pairs, type: chat_template.default}]
micro_batch_size: 2
output_dir: ./out
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    module = import_module("bdpo_plugin.cli.recipes.bundle")
    monkeypatch.setattr(module, "_draw", lambda run, folder: None)  # which takes seconds
    return recorded_run(tmp_path / "run", RECIPE)


def change(run: Path, old: str, new: str) -> None:
    file = run / "bdpo" / "recipe.yml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("some/pairs", f"'https://me:{TOKEN}@x.org/p.jsonl'", "`datasets[0].path`, line 4: needs"),
        ("some/pairs", "(left out)", "`datasets[0].path`, line 4: needs its value"),
        ("rl: bdpo", "rl: bdpo\nbdpo_recipe: {titel: x}", "there is no such key"),
    ],
)
@pytest.mark.parametrize("to", [None, "elsewhere/bundle"])
def test_a_refused_bundle_leaves_nothing_behind(run, monkeypatch, to, old, new, words) -> None:
    monkeypatch.chdir(run.parent)
    change(run, old, new)
    before = sorted(run.parent.rglob("*"))
    code, shown = bdpo("recipes", "bundle", "run", *(["--to", to] if to else []))
    assert code == 1
    assert words in shown
    assert "nothing was bundled" in shown
    assert TOKEN not in shown
    assert sorted(run.parent.rglob("*")) == before


def test_what_nobody_needs_goes_and_the_rest_is_bundled(run, monkeypatch) -> None:
    """An older run's recipe, as its file was written."""
    monkeypatch.chdir(run.parent)
    change(
        run, "rl: bdpo", f"# {TOKEN}\nrl: bdpo\nwandb_project: mine\nnotes: {TOKEN}\nhub_token: x"
    )
    change(
        run, "output_dir: ./out", f"output_dir: {run.parent}/out\nbdpo_recipe: {{author: m@x.org}}"
    )
    code, shown = bdpo("recipes", "bundle", "run")
    assert code == 0, shown
    assert "output_dir is a path of this machine: it became ./out" in shown
    assert "bdpo_recipe.author has an e-mail address: it became (left out)" in shown
    texts = {file.name: file.read_text() for file in (run / "recipe").iterdir()}
    assert set(texts) == {"recipe.yml", "run.json", "log.json"}
    for text in texts.values():
        assert not [s for s in (TOKEN, "x.org", "mine", str(run.parent), "zebra") if s in text]
    code, shown = bdpo("recipes", "bundle", "run", "--to", "with", "--with-texts")
    assert code == 0, shown
    assert json.loads(Path("with/run.json").read_text())["null_prompt"]["text"] == NULL_PROMPT


@pytest.fixture
def bundled(run, monkeypatch) -> Path:
    monkeypatch.chdir(run.parent)
    assert bdpo("recipes", "bundle", "run")[0] == 0
    return run


BASE = "base_model_name_or_path"
CARD = "---\ntags: [a]\n---\n\n# Mine\n\nOf {}.\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("README.md", CARD.format("/srv/shared/model"), "README.md, line 13: has a path of this"),
        ("README.md", CARD.format("me@x.org"), "README.md, line 13: has an e-mail address"),
        ("README.md", CARD.format(TOKEN), "README.md, line 13: looks like a token"),
        ("adapter_config.json", f'{{"{BASE}": "/srv/a/model"}}', f"`{BASE}`: is a path of this"),
        ("tokenizer_config.json", '{"name_or_path": "/srv/a/model"}', "`name_or_path`: is a path"),
        ("tokenizer_config.json", '{"a": [{"api_key": "x"}]}', "`a[0].api_key`: has the name of a"),
        ("tokenizer.json", '{"model": {"m@x.org": 1}, "x": "m@x.org"}', "`x`: has an e-mail"),
        ("config.json", '{"_name_or_path": "~/model"}', "config.json, `_name_or_path`: is a path"),
        ("config.json", "{", "config.json: is no JSON"),
        ("chat_template.jinja", "a\n{# http://gpu17:80 #}", "chat_template.jinja, line 2: has the"),
        ("recipe/run.json", f'{{"note": "{TOKEN}"}}', "run.json, `note`: looks like a token"),
        ("recipe/log.json", '[{"host": "gpu17.corp"}]', "log.json, `[0].host`: has the name"),
    ],
)  # fmt: skip
def test_publish_looks_through_every_file(bundled, file, content, words) -> None:
    (bundled / file).write_text(content)
    code, shown = bdpo("recipes", "publish", "run", "--repo", "me/model", "--push")
    assert code == 1
    assert words in shown
    assert "nothing was uploaded" in shown


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("some/pairs", "/srv/a/pairs.jsonl", "`datasets[0].path`, line 4: is a path of this"),
        ("rl: bdpo", f"rl: bdpo  # {TOKEN}", "line 2: looks like a token"),
    ],
)
def test_publish_reads_a_bundle_that_was_changed_by_hand(bundled, old, new, words) -> None:
    file = bundled / "recipe" / "recipe.yml"
    file.write_text(file.read_text().replace(old, new))
    code, shown = bdpo("recipes", "publish", "run")
    assert code == 1
    assert words in shown
    # and the card, which is made of it, has none of it
    assert not [s for s in ("/srv/a", TOKEN) if s in (bundled / "README.md").read_text()]


def test_publish_passes_what_may_leave(bundled) -> None:
    """With no card by a host; the pairs of others' words are a warning."""
    (bundled / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    (bundled / "recipe" / "pairs.jsonl").write_text('{"a": "b"}\n{"a": "my password is xyzzy"}\n')
    code, shown = bdpo("recipes", "publish", "run")
    assert code == 0, shown
    assert "warning: recipe/pairs.jsonl, line 2: says a password" in shown
    assert "\n## B-DPO\n" in (bundled / "README.md").read_text()


# --- check --run and verify, without a run -------------------------------------------------------

SCORES = {
    "row": [0, 1],
    "chosen_tokens": [3, 4],
    "rejected_tokens": [2, 2],
    "ref_chosen_logps": [-3.0, -4.0],
    "ref_rejected_logps": [-2.0, -2.5],
    "mi_chosen": [0.5, 0.7],
    "mi_rejected": [0.1, 0.3],
    "weight_chosen": [0.9, 1.1],
}


def score(folder: Path, **columns) -> None:
    table = pa.table({**SCORES, **columns}).replace_schema_metadata({"mi_unit": "nats"})
    pq.write_table(table, folder / "bdpo" / "reference_scores.parquet")


def rerecord(folder: Path, **record) -> None:
    file = folder / "bdpo" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | record))


def with_model(digest: str) -> dict:
    return {"scores": {"identity": {"reference": [digest, "tokenizer"]}}}


@pytest.fixture
def again(run, monkeypatch) -> Path:
    """The bundle of a run is in run/recipe, and its first steps leave another folder as it is."""
    monkeypatch.chdir(run.parent)
    score(run)
    rerecord(run, **with_model("a" * 32))
    code, shown = bdpo("recipes", "bundle", "run")
    assert code == 0, shown
    folder = recorded_run(run.parent / "again", RECIPE)
    score(folder)
    rerecord(folder, **with_model("a" * 32))

    @contextmanager
    def first_steps(recipe, arguments):
        yield folder

    module = import_module("bdpo_plugin.cli.recipes.first_steps")
    monkeypatch.setattr(module, "run_first_steps", first_steps)
    monkeypatch.setattr(import_module("bdpo_plugin.cli.recipes.check"), "_host", lambda recipe: [])
    return folder


CHECK = ("recipes", "check", "run/recipe", "--run")


def test_a_run_that_fits_is_shown_with_the_line_to_paste(again) -> None:
    code, shown = bdpo(*CHECK)
    assert code == 0, shown
    rows = {cells[0]: cells[1:] for line in shown.splitlines() if len(cells := table_row(line)) > 1}
    assert rows["bdpo_alpha"] == ["1.5", "1.5", "", "", "same"]
    assert rows["MI of rejected, 95 %"] == ["0.3", "0.3", "0", "0.001", "same"]
    assert rows["loss at step 1"] == ["0.6931", "0.6931", "0", "0.003", "same"]
    assert rows["the model's weights"][:2] == ["aaaaaaaa…"] * 2
    pasted = shown.partition("in it:\n\n")[2].partition("\nor let")[0]
    (entry,) = yaml.safe_load(pasted)["verified"]
    assert (entry["by"], entry["hardware"]) == ("YOUR NAME", "1 x CPU")
    code, shown = bdpo(*CHECK, "--json")
    said = json.loads(shown)
    assert all(row["same"] for row in said["compared"])
    assert not any(finding["wrong"] for finding in said["findings"])


def table_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


SETTINGS = {"settings": {"bdpo_alpha": 2.0}}


@pytest.mark.parametrize(
    ("record", "columns", "words"),
    [
        ({"seed": 3}, {}, "`seed`: 3 here, 1 expected"),
        (SETTINGS, {}, "`bdpo_alpha`: 2.0 here, 1.5 expected"),
        ({}, {"mi_chosen": [0.5, 0.6]}, "`mi_chosen`: MI of chosen, 95 %: 0.6 here, 0.7 expec"),
        (
            with_model("b" * 32),
            {"mi_chosen": [0.5, 0.6]},
            "`base_model: Qwen/Qwen2-7B-Instruct`: the model is another one",
        ),
        ({"rows": "b" * 32}, {"chosen_tokens": [3, 9]}, "1 of 2 rows are not the recipe's; the"),
        ({"rows": "b" * 32}, {"chosen_tokens": [3, 9]}, "row 1, place 1: responses of 9 and 2 tok"),
        ({"rows": "b" * 32}, {"ref_chosen_logps": [-3.0, -9.0]}, "1 of 2 rows are not"),
        (
            {"rows": "b" * 32},
            {"ref_chosen_logps": [-9.0, -9.0]},
            "all 2 rows have responses of the same length, but other log-probabilities",
        ),
        ({"rows": "b" * 32}, {}, "the responses are the same, so prompts or the order"),
    ],
)  # fmt: skip
def test_what_differs_is_said_in_the_users_words(again, record, columns, words) -> None:
    rerecord(again, **record)
    score(again, **columns)
    code, shown = bdpo(*CHECK)
    assert code == 1
    assert words in shown
    assert "DIFFERS" in shown
    assert "verified" not in shown


def test_another_model_of_the_same_mutual_information_is_a_warning(again) -> None:
    rerecord(again, **with_model("b" * 32))
    code, shown = bdpo(*CHECK)
    assert code == 0
    assert "not to the last bit the model of the recipe" in shown


def test_losses_alone_that_differ(again) -> None:
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 0.7}]}
    (again / "trainer_state.json").write_text(json.dumps(state))
    code, shown = bdpo(*CHECK)
    assert code == 1
    assert "loss at step 1: 0.7 here, 0.6931 expected; the tolerance is 0.003. All that" in shown


def test_rows_without_the_bundles_scores(again) -> None:
    Path("run/recipe/scores.parquet").unlink()
    rerecord(again, rows="b" * 32)
    code, shown = bdpo(*CHECK)
    assert code == 1
    assert "The bundle of the run would tell which rows" in shown


def test_verify_writes_one_entry_and_says_how_to_send_it(again) -> None:
    file = Path("run/recipe/recipe.yml")
    text = file.read_text()
    first = "# A comment\n  title:"
    file.write_text(text.replace("  title:", first))
    for number, name in enumerate(("Ann: of Ö", "Bob"), 1):
        before = file.read_text()
        code, shown = bdpo("recipes", "verify", "run/recipe", "--by", name)
        assert code == 0, shown
        assert "send run/recipe/recipe.yml to whoever you have the recipe from" in shown
        assert "`bdpo recipes publish run`" in shown
        after = file.read_text()
        new = [line for line in after.splitlines() if line not in before.splitlines()]
        assert len(new) <= 4
        entries = yaml.safe_load(after)["bdpo_recipe"]["verified"]
        assert len(entries) == number
        assert entries[0]["by"] == name
        assert first in after
        assert bdpo("recipes", "check", "run/recipe")[0] == 0


def test_verify_of_a_mapping_in_braces(again) -> None:
    file = Path("run/recipe/recipe.yml")
    content = yaml.safe_load(file.read_text())
    about = yaml.safe_dump(content["bdpo_recipe"], default_flow_style=True, width=10**6)
    file.write_text(f"{RECIPE}bdpo_recipe: {about}")
    content = yaml.safe_load(file.read_text())
    code, shown = bdpo("recipes", "verify", "run/recipe", "--by", "Ann")
    assert code == 0, shown
    changed = yaml.safe_load(file.read_text())
    (entry,) = changed["bdpo_recipe"].pop("verified")
    assert entry["by"] == "Ann"
    assert changed == content


def test_verify_refuses(again) -> None:
    file = Path("run/recipe/recipe.yml")
    before = file.read_text()
    code, shown = bdpo("recipes", "verify", "run/recipe", "--by", "me@x.org")
    assert code == 1
    assert "has an e-mail address, which no recipe may have" in shown
    code, shown = bdpo("recipes", "verify", "smollm2-135m.yml", "--by", "me")
    assert code == 1
    code, shown = bdpo("recipes", "verify", "axolotl/smollm2-135m", "--by", "me")
    assert code == 1
    assert "bdpo recipes copy axolotl/smollm2-135m" in shown
    rerecord(again, seed=3)
    code, shown = bdpo("recipes", "verify", "run/recipe", "--by", "me")
    assert code == 1
    assert "nothing was written" in shown
    assert file.read_text() == before


def test_a_continued_run_has_no_minutes(run, monkeypatch) -> None:
    from bdpo_plugin.recipes.run_numbers import measured_of

    record = json.loads((run / "bdpo" / "run.json").read_text())
    (run / "bdpo" / "run.json").write_text(json.dumps(record | {"train_runtime": 90.0}))
    assert measured_of(run) == {"hardware": "1 x CPU", "minutes": 1.5}
