"""LlamaBoard in a real browser: where its users choose B-DPO and set its keys."""

import json
import shlex
import shutil
import time

import pytest
import yaml

pytest.importorskip("llamafactory")

from browser import CHROMIUM, Browser
from llamafactory.hparams import get_train_args

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]

#: Functions in the page that do what a person does with a field of this name.
HANDS = """
const labels = name => [...document.querySelectorAll("label")].filter(
    label => label.innerText.split("\\n")[0].trim() === name);
const info = name => [...document.querySelectorAll("[data-testid=block-info]")].find(
    one => one.innerText.trim() === name);
const field = name => document.querySelector(`input[aria-label="${name}"]`)
    || info(name)?.closest(".block").querySelector("input") || null;
const open_ = name => field(name).focus();
const options = () => [...document.querySelectorAll("ul[role=listbox] li")];
const choose = name => options().find(one => one.innerText.replace("✓", "").trim() === name)
    .dispatchEvent(new MouseEvent("mousedown", {bubbles: true}));
const write = (name, text) => {
    const box = labels(name)[0].querySelector("textarea, input");
    box.value = text;
    box.dispatchEvent(new Event("input", {bubbles: true}));
};
const push = name => [...document.querySelectorAll("button")].find(
    button => button.innerText.trim().startsWith(name)).click();
"""


def until(page, script):
    """Wait for a script of the page to be true, and return what it is."""
    for _ in range(300):
        if found := page.evaluate(script):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{script} did not come true: {page.evaluate('document.body.innerText')}")


def choose(page, name, option):
    until(page, f"field({name!r}) !== null")
    page.evaluate(f"open_({name!r})")
    until(page, f"options().some(one => one.innerText.replace('✓', '').trim() === {option!r})")
    page.evaluate(f"choose({option!r}); field({name!r}).blur()")


@pytest.fixture
def board(tiny, tmp_path, monkeypatch):
    """The address of a board whose user has a model and data."""
    from llamafactory.webui.interface import create_ui

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    (tmp_path / "data").mkdir()
    for name in ("dataset_info.json", "train.jsonl"):
        shutil.copy(tiny / name, tmp_path / "data" / name)
    (tmp_path / "llamaboard_cache").mkdir()
    settings = {"lang": "en", "hub_name": "huggingface", "last_model": "Custom", "cache_dir": None}
    settings["path_dict"] = {"Custom": str(tiny / "model")}
    (tmp_path / "llamaboard_cache" / "user_config.yaml").write_text(yaml.safe_dump(settings))
    board = create_ui().queue()
    _, address, _ = board.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    board.close()


def test_its_users_set_the_keys_in_the_extra_arguments(board, tmp_path):
    extra = {"optim": "adamw_torch", "bdpo_alpha": 0.5, "bdpo_scaling": False}
    here = {"use_cpu": True, "bf16": False, "preprocessing_num_workers": 1}
    with Browser(board, tmp_path / "profile") as page:
        page.evaluate(HANDS)
        choose(page, "Stage", "DPO")
        choose(page, "Dataset", "train")
        page.evaluate("push('RLHF configurations'); push('Extra configurations')")
        choose(page, "Loss type", "bdpo")
        page.evaluate(f"write('Extra arguments', {json.dumps(json.dumps(extra | here))})")
        until(page, "labels('Model path')[0].querySelector('textarea, input').value")
        page.evaluate("push('Preview command')")
        shown = until(
            page,
            "[...document.querySelectorAll('pre')].map(box => box.innerText)"
            ".find(text => text.includes('llamafactory-cli train'))",
        )
    words = shlex.split(shown.replace("\\\n", " ").replace("\n", " "))
    arguments = words[words.index("train") + 1 :]
    assert arguments[arguments.index("--pref_loss") + 1] == "bdpo"
    keys = {
        name.removeprefix("--"): yaml.safe_load(value)
        for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    *_, finetuning, _ = get_train_args(keys)
    assert (finetuning.pref_loss, finetuning.bdpo_alpha) == ("bdpo", 0.5)
    assert finetuning.bdpo_scaling is False
