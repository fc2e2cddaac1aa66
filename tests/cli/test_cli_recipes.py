"""`bdpo recipes`: what it lists and shows, and what it refuses to share."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from commandline import bdpo
from fake_hub import COMMIT, FakeHub

from bdpo_plugin.cli.recipes.list import in_hours
from bdpo_plugin.inspection.gpus import USABLE
from bdpo_plugin.recipes.recipe_file import find_recipe, is_sweep, recipe_files, recipe_root
from bdpo_plugin.recipes.shareable import findings
from bdpo_plugin.redact import text_left_out
from bdpo_plugin.settings import BDPOSettings

EVERY = recipe_files(recipe_root())
RECIPES = {name: path for name, path in EVERY.items() if not is_sweep(name)}
SWEEPS = {name: path for name, path in EVERY.items() if is_sweep(name)}

RECIPE = """\
# A recipe.
base_model: Qwen/Qwen2-7B-Instruct
revision_of_model: 0123456789abcdef0123456789abcdef01234567
plugins: [bdpo_plugin.BDPOPlugin]
rl: bdpo
datasets:
  - path: ./data/pairs.jsonl
    type: chat_template.default
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 5e-6
output_dir: ./out

bdpo_recipe:
  title: Mine
  processes: 2
  batch: 16
  data: {command: python pairs.py}
"""


@pytest.fixture
def told(tmp_path):
    """(wrong, where, what) of each finding in a recipe with some text put in the place of other."""

    def check(*changes: tuple[str, str]) -> list[tuple[bool, str, str]]:
        text = RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "mine.yml").write_text(text)
        return [tuple(finding) for finding in findings(find_recipe(str(tmp_path / "mine.yml")))]

    return check


def wrong(found) -> list[str]:
    return [f"{where}: {what}" for is_wrong, where, what in found if is_wrong]


# --- list, show, copy ---------------------------------------------------------------------------


def test_list_has_every_recipe() -> None:
    code, shown = bdpo("recipes", "list", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(shown)}
    assert {name: entry["path"] for name, entry in listed.items()} == {
        name: str(path) for name, path in RECIPES.items()
    }
    for name, entry in listed.items():
        assert name.startswith(f"{entry['host']}/")
        assert entry["title"]
        assert entry["needs"]
        assert entry["data"].startswith("bdpo ")
    methods = {n.rpartition("-")[2]: e["method"] for n, e in listed.items() if "-7b-" in n}
    assert methods == {"full": "full", "lora": "lora", "qlora": "qlora"}
    for command in (["recipes"], ["recipes", "list"]):
        code, shown = bdpo(*command)
        assert code == 0
        for name in EVERY:
            assert name in shown


def test_the_gallery_of_the_documents_is_the_list() -> None:
    text = (recipe_root().parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.split("## The gallery")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    shown = [[cell.strip(" `|") for cell in line] for line in lines[2:]]
    entries = json.loads(bdpo("recipes", "list", "--json")[1])
    assert shown == [gallery_row(entry) for entry in entries]


def gallery_row(entry: dict) -> list[str]:
    """What the table in docs/recipes.md has of an entry of the list."""
    measured = entry["measured"] or {}
    units = {"hardware": "", "minutes": " min", "memory_gib": " GiB"}
    parts = [f"{measured[key]}{unit}" for key, unit in units.items() if key in measured]
    verified = [f"{v['by']}, {v['hardware']}" for v in entry["verified"]]
    cells = [entry[key] for key in ("name", "model", "method", "needs")]
    estimate = entry["estimate"]
    cells.append(f"{estimate['memory_gib']:.1f}")
    cells.append(" / ".join(map(in_hours, estimate["hours"].values())))
    return [*cells, ", ".join(parts) or "no", "; ".join(verified) or "no"]


def test_a_recipe_fits_by_estimate_on_the_hardware_that_it_is_written_for() -> None:
    for entry in json.loads(bdpo("recipes", "list", "--json")[1]):
        assert re.fullmatch(r"\d+ (GPUs?|CPU cores)( of \d+ GB)?", entry["needs"])
        if of := re.search(r"of (\d+) GB", entry["needs"]):
            assert entry["estimate"]["memory_gib"] < USABLE * int(of[1]) * 1e9 / 2**30
            hours = entry["estimate"]["hours"]
            assert hours["80 GB"] is not None
            if f"{of[1]} GB" in hours:
                assert hours[f"{of[1]} GB"] is not None


def test_list_loads_no_library_of_models() -> None:
    code = "import sys; from bdpo_plugin.cli.recipes.list import entries; entries(); "
    code += "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "set()"


def test_both_hosts_have_the_same_models() -> None:
    names = {host: {n.partition("/")[2] for n in RECIPES if n.startswith(host)} for host in HOSTS}
    assert names["axolotl"] - {"tiny-cpu"} == names["llamafactory"] - {"tiny"}


HOSTS = ("axolotl", "llamafactory")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_asks_for_bdpo_with_keys_that_exist(name) -> None:
    recipe = yaml.safe_load(RECIPES[name].read_text())
    asked = (recipe.get("rl"), recipe.get("pref_loss"))
    assert asked == (None, None) if name.startswith("trl/") else "bdpo" in asked
    assert "bdpo_alpha" in recipe
    assert BDPOSettings.from_keys(recipe).alpha == 1.5


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_are_of_our_keys(name) -> None:
    sweep = yaml.safe_load(SWEEPS[name].read_text())
    paired = sweep.pop("_", [{}])
    seeds = sweep.pop("seed", [0])
    assert len(set(seeds)) == len(seeds)
    for entry in paired:
        for key, values in sweep.items():
            for value in values:
                BDPOSettings.from_keys({**entry, key: value})
        BDPOSettings.from_keys(entry)


def test_show_has_the_yaml_and_what_to_expect(told, tmp_path) -> None:
    code, shown = bdpo("recipes", "show", "qwen3-0.6b.yml")
    assert code == 1
    assert "several recipes are called" in shown
    code, shown = bdpo("recipes", "show", "axolotl/qwen3-0.6b")
    assert code == 0
    assert RECIPES["axolotl/qwen3-0.6b"].read_text().rstrip() in shown
    assert "Nobody has yet run it" in shown
    told(("  batch: 16\n", "  batch: 16\n  expected:\n    pairs: 7\n    losses: {1: 0.6931}\n"))
    code, shown = bdpo("recipes", "show", str(tmp_path / "mine.yml"))
    assert code == 0
    assert "1: 0.6931" in shown
    code, shown = bdpo("recipes", "show", str(tmp_path / "mine.yml"), "--json")
    assert json.loads(shown)["about"]["expected"]["pairs"] == 7
    assert json.loads(shown)["host"] == "axolotl"


@pytest.mark.parametrize("command", ["show", "pin"])
def test_a_mapping_of_another_form_is_told(command, told, tmp_path) -> None:
    told(("  data: {command: python pairs.py}\n", "  data: mine\n"))
    code, shown = bdpo("recipes", command, str(tmp_path / "mine.yml"))
    assert code == 1
    assert "`bdpo_recipe.data`: must be a mapping, not 'mine'" in shown


def test_copy_says_what_makes_the_data(tmp_path) -> None:
    code, shown = bdpo("recipes", "copy", "llamafactory/vicuna-7b-full", str(tmp_path))
    assert code == 0
    assert "bdpo data pku-saferlhf --output data/pku-saferlhf.jsonl" in shown
    assert f"llamafactory-cli train {tmp_path / 'vicuna-7b-full.yml'}" in shown
    code, shown = bdpo("recipes", "copy", "alpha", str(tmp_path))
    assert f"axolotl train RECIPE --sweep {tmp_path / 'alpha.yml'}" in shown


def test_what_is_no_recipe_is_told(tmp_path) -> None:
    for text, words in (("a: [", "cannot be read as YAML"), ("a: 1", "is no recipe")):
        (tmp_path / "mine.yml").write_text(text)
        code, shown = bdpo("recipes", "show", str(tmp_path / "mine.yml"))
        assert code == 1
        assert words in shown
    code, shown = bdpo("recipes", "check", str(tmp_path / "other.yml"))
    assert code == 1
    assert "there is no file" in shown


# --- check, without a host ----------------------------------------------------------------------


def test_nothing_wrong(told) -> None:
    found = told()
    assert wrong(found) == []
    (warning,) = found
    assert "the batch of 16 needs 2 GPUs" in warning[2]


HOME = "/".join(("", "home", "me"))
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("# A recipe.", f"# login with {TOKEN}", "line 1: looks like a token"),
        ("rl: bdpo", f"rl: bdpo\nwandb_run_id: {TOKEN}", "`wandb_run_id`, line 6: looks like"),
        ("rl: bdpo", "rl: bdpo\ncomet_api_key: abc", "`comet_api_key`, line 6: has the name of a"),
        ("rl: bdpo", "rl: bdpo\nhf_hub_token: 'x y'", "`hf_hub_token`, line 6: has the name of a"),
        ("rl: bdpo", "rl: bdpo\nnote: |  # ask me@x.org\n  a", "line 6: has an e-mail address"),
        ("rl: bdpo", f"rl: bdpo\nnote: &{TOKEN} a", "line 6: looks like a token"),
        ("rl: bdpo", "rl: bdpo\na: {b: [c, {d: me@x.org}]}", "`a.b[1].d`, line 6: has an e-mail"),
        ("rl: bdpo", "rl: bdpo\nme@x.org: a", "line 6: a key there has an e-mail address"),
        ("rl: bdpo", f"rl: bdpo\nseed: {TOKEN}\nseed: 1", "`seed`, line 6: looks like a token"),
        ("./out", '"https://u:p@x.org/"', "`output_dir`, line 12: has the user or the password"),
        (
            "title: Mine",
            "title: " + "0123456789abcdef" * 2 + "01234567",
            "`bdpo_recipe.title`, line",
        ),
        ("./out", "/scratch/me/out", "`output_dir`, line 12: is a path of this machine"),
        ("./out", "~/out", "`output_dir`, line 12: is a path of this machine, ~/out"),
        ("./data/pairs", "/data/pairs", "`datasets[0].path`, line 7: is a path of this machine"),
        (
            "# A recipe.",
            f"# as in {HOME}/notes",
            "line 1: has a path of this machine: write a relative one, or remove it",
        ),
        (
            "rl: bdpo",
            "rl: bdpo\nbdpo_alhpa: 1",
            "Unknown key `bdpo_alhpa`. Did you mean `bdpo_alpha`",
        ),
        ("title: Mine", "titel: Mine", "`bdpo_recipe`, line 14: it needs a `title`"),
        ("title: Mine", "titel: Mine", "line 15: there is no such key. Did you mean `title`?"),
        ("title: Mine", "title: Mine\n  wxyz: 1", "line 16: there is no such key. Keys: title, a"),
        ("processes: 2", "processes: two", "line 16: must be a whole number, not 'two'"),
        ("  batch: 16", "  batch: 8", "line 9: 8 pairs x 2 processes are not the `batch` of 8"),
        (
            "rl: bdpo",
            "rl: bdpo\nattn_implementation: kernels-community/flash-attn2",
            "line 6: kernels-community/flash-attn2 is code of the hub that may change",
        ),
    ],
)
def test_refused(told, old, new, words) -> None:
    assert any(words in line for line in wrong(told((old, new))))


LOCAL = ("Qwen/Qwen2-7B-Instruct", "./model")
COMMAND = ("  data: {command: python pairs.py}\n", "")
EXPECTED = "  expected: {losses: {1: 0.6931}, tolerance: {loss: 0.003, mi: 0.001}}\n"


def test_nobody_else_has_a_model_and_data_of_this_machine(told) -> None:
    (line,) = wrong(told(LOCAL, COMMAND))
    assert line.startswith("`base_model`, line 2: nobody else has ./model and ./data/pairs.jsonl: ")
    assert "`bdpo_recipe.data`" in line
    assert wrong(told(LOCAL)) == []
    assert wrong(told(LOCAL, (COMMAND[0], "  data: {source: some/pairs}\n"))) == []
    hub = ("./data/pairs.jsonl", "some/pairs")
    adapter = ("rl: bdpo", "rl: bdpo\nlora_model_dir: ./adapter")
    one = {"data/pairs.jsonl": (), "model": (LOCAL, hub), "adapter": (adapter, hub)}
    for name, changes in one.items():
        (line,) = wrong(told(*changes, COMMAND))
        assert f"nobody else has ./{name}: say in `bdpo_recipe.data`" in line
    (line,) = wrong(told((COMMAND[0], "  data: {source: ./mine.jsonl}\n")))
    assert line == "`bdpo_recipe.data.source`, line 18: nobody else has ./mine.jsonl"


@pytest.mark.parametrize("value", ["0", "-1", "-0.5", "2", "1.0e+9"])
@pytest.mark.parametrize("key", ["loss", "mi"])
def test_tolerances_that_say_nothing_are_refused(told, key, value) -> None:
    before = {"loss": "loss: 0.003", "mi": "mi: 0.001"}[key]
    text = EXPECTED.replace(before, f"{key}: {value}")
    (line,) = wrong(told((COMMAND[0], COMMAND[0] + text)))
    assert f"`bdpo_recipe.expected.tolerance.{key}`, line 19: must be above 0 and at most" in line
    assert wrong(told((COMMAND[0], COMMAND[0] + EXPECTED))) == []


def test_tolerances_wider_than_what_is_expected_are_refused(told) -> None:
    """A run that learns nothing, or a model that knows no prompt, would be within them."""
    text = (
        "  expected: {losses: {1: 0.69, 2: 0.59}, mi_chosen: [0.0, 0.1, 0.3], "
        "tolerance: {loss: LOSS, mi: MI}}\n"
    )

    def check(loss: float, mi: float) -> list[str]:
        filled = text.replace("LOSS", str(loss)).replace("MI", str(mi))
        return wrong(told((COMMAND[0], COMMAND[0] + filled)))

    assert check(0.09, 0.29) == []
    (line,) = check(0.2, 0.29)
    assert "tolerance.loss`, line 19: must be above 0 and at most 0.1, not 0.2" in line
    (line,) = check(0.09, 0.4)
    assert "tolerance.mi`, line 19: must be above 0 and at most 0.3, not 0.4" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("losses:", "mi_chosen: [1.0, 2.0], losses:", "must be 3 numbers, at 5, 50 and 95 %"),
        ("0.003", ".nan", "`bdpo_recipe.expected.tolerance.loss`, line 19: must be a finite"),
        ("0.6931", ".inf", "`bdpo_recipe.expected.losses[1]`, line 19: must be a finite number"),
        ("{1:", "{one:", "`bdpo_recipe.expected.losses.one`, line 19: must be a step"),
        (", tolerance: {loss: 0.003, mi: 0.001}", "", "need a `tolerance` of the `loss`"),
        (
            "tolerance: {loss: 0.003, mi: 0.001}",
            "mi_rejected: [1, 2, 3], tolerance: {loss: 0.003}",
            "`bdpo_recipe.expected.mi_rejected`, line 19: needs a `tolerance` of the `mi`",
        ),
    ],
)
def test_numbers_to_expect_that_are_none(told, old, new, words) -> None:
    text = EXPECTED.replace(old, new)
    (line,) = wrong(told((COMMAND[0], COMMAND[0] + text)))
    assert words in line


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {b: *a}",
        "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 1}]\n" for i in range(9)),
    ],
)
def test_a_file_that_aliases_make_endless_is_no_recipe(told, tmp_path, text) -> None:
    told()
    with (tmp_path / "mine.yml").open("a") as file:
        file.write(f"\n{text}\n")
    code, shown = bdpo("recipes", "check", str(tmp_path / "mine.yml"))
    assert code == 1
    assert "is no recipe: it is longer, or nested deeper, than one" in shown


def test_what_was_left_out_of_a_recipe_is_named(told, tmp_path) -> None:
    """By check, and before a host is started."""
    text = ("rl: bdpo", f'rl: bdpo\nchat_template_jinja: "{text_left_out("x")}"')
    (line,) = wrong(told(text))
    assert line.startswith("`chat_template_jinja`, line 6: needs its text, which was left out")
    code, shown = bdpo("recipes", "run", str(tmp_path / "mine.yml"))
    assert code == 1
    assert "`chat_template_jinja` needs its text" in shown
    assert "bundle --with-texts" in shown
    (line,) = wrong(told(("./data/pairs.jsonl", '"(left out)"')))
    assert line.startswith("`datasets[0].path`, line 7: needs its value, which was left out")


REVISION = "revision_of_model: 0123456789abcdef0123456789abcdef01234567\n"


@pytest.mark.parametrize("revision", ["", "revision_of_model: main\n"])
def test_remote_code_without_a_commit_is_refused(told, revision) -> None:
    code = ("rl: bdpo", "rl: bdpo\ntrust_remote_code: true")
    (line,) = wrong(told(code, (REVISION, revision)))
    assert "runs code of Qwen/Qwen2-7B-Instruct that may change" in line
    assert line.startswith("`trust_remote_code`, line ")
    assert wrong(told(code)) == []
    hub = ("path: ./data/pairs.jsonl", "path: some/pairs")
    assert "runs code of some/pairs" in wrong(told(code, hub))[0]


def test_warned_of(told) -> None:
    without = ("  processes: 2\n  batch: 16\n", "")
    found = told(without, (REVISION, ""), ("path: ./data/pairs.jsonl", "path: some/pairs"))
    assert wrong(found) == []
    words = " ".join(what for _, _, what in found)
    assert "Qwen/Qwen2-7B-Instruct has no pinned revision" in words
    assert "some/pairs has no pinned revision" in words
    assert "with another number of GPUs this is another recipe" in words


def test_names_of_special_tokens_are_no_secrets(told) -> None:
    keys = "rl: bdpo\nspecial_tokens:\n  eos_token: <|im_end|>\n  pad_token: <pad>"
    assert wrong(told(("rl: bdpo", keys))) == []


def test_another_mapping_takes_the_place_of_the_one_before(told, tmp_path) -> None:
    told()
    recipe = find_recipe(str(tmp_path / "mine.yml"))
    text = recipe.with_about({"title": "Other", "expected": {"losses": {1: 0.5}}})
    (tmp_path / "mine.yml").write_text(text)
    again = find_recipe(str(tmp_path / "mine.yml"))
    assert again.about == {"title": "Other", "expected": {"losses": {1: 0.5}}}
    assert again.config == recipe.config
    assert again.with_about(again.about) == text
    assert len(re.findall("bdpo_recipe:", text)) == 1
    assert text.startswith("# A recipe.\nbase_model")


# --- pin ----------------------------------------------------------------------------------------


PIN = [sys.executable, "-c", "from bdpo_plugin.cli import main; main()", "recipes", "pin"]


def test_pin_writes_the_commits_of_the_hub(tmp_path) -> None:
    file = tmp_path / "mine.yml"
    shutil.copy(RECIPES["axolotl/qwen3-0.6b"], file)
    with FakeHub() as hub:
        for _ in range(2):
            environment = {**os.environ, **hub.environment}
            done = subprocess.run(
                [*PIN, str(file)], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert "Nothing to pin" in done.stdout
    recipe = find_recipe(str(file))
    assert recipe.config["revision_of_model"] == COMMIT
    assert recipe.about["data"]["revision"] == COMMIT
    assert recipe.about["data"]["command"].endswith(f" --revision {COMMIT}")
    assert list(findings(recipe)) == []
    before = find_recipe("axolotl/qwen3-0.6b")
    assert {**before.config, "revision_of_model": COMMIT} == recipe.config
    assert recipe.text.startswith(before.text[:200])


@pytest.mark.parametrize("offline", ["1", "0"])
def test_pin_without_a_network_changes_nothing(offline, tmp_path) -> None:
    file = tmp_path / "mine.yml"
    shutil.copy(RECIPES["llamafactory/qwen3-0.6b"], file)
    nowhere = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*PIN, str(file)], env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Error: the hub does not answer: " in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_text() == RECIPES["llamafactory/qwen3-0.6b"].read_text()
