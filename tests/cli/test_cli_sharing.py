"""`bdpo recipes bundle` and `publish`: what they refuse, by key and line, and what is left then."""

import json
from importlib import import_module
from pathlib import Path

import pytest
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
        ("README.md", CARD.format("/srv/shared/model"), "README.md, line 10: has a path of this"),
        ("README.md", CARD.format("me@x.org"), "README.md, line 10: has an e-mail address"),
        ("README.md", CARD.format(TOKEN), "README.md, line 10: looks like a token"),
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


def test_a_continued_run_has_no_minutes(run, monkeypatch) -> None:
    from bdpo_plugin.recipes.measured import measured_of

    record = json.loads((run / "bdpo" / "run.json").read_text())
    (run / "bdpo" / "run.json").write_text(json.dumps(record | {"train_runtime": 90.0}))
    assert measured_of(run) == {"hardware": "1 x CPU", "minutes": 1.5}
