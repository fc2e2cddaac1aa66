"""The README.md that a run leaves behind."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from running import scores, trainer
from transformers import AutoModelForCausalLM

from bdpo_plugin import BDPOSettings
from bdpo_plugin.demo.tiny import write
from bdpo_plugin.output.model_card import complete_card

OTHERS = "---\ntags:\n- theirs\n- host\n---\n\n# Theirs\n\nTheir text.\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(OTHERS, encoding="utf-8")
    return tmp_path


def text(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_trainers_card_has_our_name_paper_tags_and_figures(tmp_path) -> None:
    made = trainer(output_dir=tmp_path, bdpo_alpha=0.75)
    made.create_model_card("a model")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"bdpo", "dpo", "trl"} <= set(card.data.tags)
    assert "trained with B-DPO" in card.text
    assert "arxiv.org/abs/2603.22829" in card.text or "papers/2603.22829" in card.text
    assert card.text.count("zhao2026bdpo") == 1
    assert "rafailov2023direct" not in card.text
    assert "| `bdpo_alpha` | `0.75` |" in card.text
    assert "| `bdpo_null_prompt` | derived |" in card.text
    saved = scores(tmp_path)
    higher = sum(a > b for a, b in zip(saved["mi_chosen"], saved["mi_rejected"], strict=True))
    assert f"| pairs in which chosen has the higher MI | {higher / 24:.1%} |" in card.text
    assert "| training pairs | 24 |" in card.text
    assert "Control" not in card.text


def test_what_the_host_wrote_stays_and_twice_is_once(folder) -> None:
    for _ in range(2):
        complete_card(folder, BDPOSettings(null_prompt="a|b\nc"), cite=True)
    assert text(folder).count("## B-DPO\n") == 1
    assert "Their text." in text(folder)
    assert ModelCard.load(folder / "README.md").data.tags == ["bdpo", "dpo", "host", "theirs"]
    assert text(folder).count("zhao2026bdpo") == 1
    (row,) = [line for line in text(folder).splitlines() if "null_prompt" in line]
    assert re.fullmatch(r"\| `bdpo_null_prompt` \| `'\(text left out, digest \w{32}\)'` \|", row)


def test_pictures_and_the_recipe_without_its_secrets(folder) -> None:
    (folder / "curves.png").write_bytes(b"")
    secrets = ["hf_" + "a" * 34, "sk-" + "b" * 30, "0123456789abcdef" * 2 + "01234567"]
    configuration = {"rl": "bdpo", "k": secrets, "chat_template_jinja": "{{ messages }} Be good."}
    complete_card(folder, BDPOSettings(), configuration=configuration)
    assert "![Training curves](./curves.png)" in text(folder)
    assert "mi_scatter.png" not in text(folder)
    title = "<summary>The configuration</summary>"
    (shown,) = re.findall(rf"{title}\n\n```yaml\n(.*?)```", text(folder), re.S)
    assert shown.startswith("rl: bdpo\n")
    assert shown.count("(left out)") == 3
    assert not any(secret in text(folder) for secret in [*secrets, "Be good."])
    assert "chat_template_jinja: (text left out, digest " in shown


@pytest.mark.parametrize("content", [None, "no front matter"])
def test_a_card_that_no_host_wrote_is_made_without_asking_the_hub(
    content, tmp_path, monkeypatch
) -> None:
    """LLaMA-Factory writes none on any machine but the first."""

    def asked(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    monkeypatch.setattr("socket.getaddrinfo", asked)
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    complete_card(tmp_path, BDPOSettings())
    assert "\n## B-DPO\n" in text(tmp_path)
    assert (content or "# A model trained with B-DPO") in text(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["bdpo", "dpo"]


def test_a_control_says_so_first(folder) -> None:
    complete_card(folder, BDPOSettings(control="random"))
    section = text(folder).partition("## B-DPO\n\n")[2]
    assert section.startswith("**`bdpo_control: random`. This is not B-DPO but its control")
    assert Path(folder, "README.md").is_file()


# --- what the card says of the model, the data and the figures -----------------------------------


def record(folder: Path, **changes) -> None:
    (folder / "bdpo").mkdir(exist_ok=True)
    found = {"chat_template": "a digest", "loss": {"beta": 0.25}, "model_commit": None, **changes}
    (folder / "bdpo" / "run.json").write_text(json.dumps(found))


LOG = [
    {"step": 1, "loss": 0.7},
    {"step": 1, "eval_safe_loss": 0.5, "eval_safe_runtime": 1, "eval_rewards/accuracies": 0.75},
    {"step": 2, "eval_safe_loss": 0.4, "eval_safe_runtime": 1, "eval_rewards/accuracies": 0.8},
]
#: The parts of a card of TRL, and of one of LLaMA-Factory, that are wrong for a local model.
OF_TRL = """---
library_name: transformers
licence: license
---

# Model Card for None

This model is a fine-tuned version of [None](https://huggingface.co/None).

## Quick start

```python
generator = pipeline("text-generation", model="None", device="cuda")
```

## Training procedure

Theirs.

```bibtex
@a{}
```
"""
OF_LLAMA_FACTORY = """---
license: other
base_model: tiny/model
tags:
- base_model:adapter:tiny/model
---

# run

This model is a fine-tuned version of [tiny/model](https://huggingface.co/tiny/model) on the train dataset.

## Model description
"""  # noqa: E501


@pytest.mark.parametrize("theirs", [OF_TRL, OF_LLAMA_FACTORY, None])
@pytest.mark.parametrize("on_hub", [False, True])
def test_model_data_licence_figures_and_beta(tmp_path, monkeypatch, theirs, on_hub) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    if theirs:
        (folder / "README.md").write_text(theirs)
    (folder / "adapter_config.json").write_text("{}")
    record(folder, model_commit="c" * 40 if on_hub else None)
    configuration = {
        "base_model": "tiny/model",
        "datasets": [{"path": "./tiny/train.jsonl"}, {"path": "some/pairs"}],
        "bdpo_recipe": {"licence": "Apache-2.0", "data": {"command": "bdpo tiny tiny"}},
    }
    for _ in range(2):
        complete_card("run", BDPOSettings(), configuration=configuration, log=LOG)
    shown = text(folder)
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert "None" not in shown
    assert (data["library_name"], data["license"]) == ("peft", "apache-2.0")
    assert data["datasets"] == ["some/pairs"]
    assert data.get("base_model") == ("tiny/model" if on_hub else None)
    assert not {"licence", "base_model:adapter:tiny/model"} & {*data, *data["tags"]}
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "safe"
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"loss": 0.4, "accuracy": 0.8}
    assert "| safe | 0.4 | 0.8 |  |" in shown
    assert "| beta | 0.25 |" in shown
    assert "| licence | Apache-2.0 |" in shown
    assert "`./tiny/train.jsonl`, [some/pairs](https://huggingface.co/datasets/some/pairs)" in shown
    link = "[tiny/model](https://huggingface.co/tiny/model)"
    local = "`tiny/model` (not on the hub, which `bdpo tiny tiny` makes)"
    assert f"| base model | {link if on_hub else local} |" in shown
    assert (link in shown) is on_hub
    assert shown.count("Quick start") == 1
    assert shown.count('from_pretrained("tiny/model")') == 1
    assert "pipeline(" not in shown
    assert ("Theirs." in shown) is (theirs == OF_TRL)
    assert ("@a{}" in shown) is (theirs == OF_TRL)


def test_the_recipe_names_the_model_on_the_hub_of_which_a_path_is_a_copy(tmp_path) -> None:
    record(tmp_path)
    configuration = {"base_model": "./copy", "bdpo_recipe": {"base_model": "some/model"}}
    complete_card(tmp_path, BDPOSettings(), configuration=configuration, repo="me/mine")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "some/model"
    assert 'trained = "me/mine"' in text(tmp_path)


def test_paths_and_secrets_of_the_user_are_not_in_it(tmp_path) -> None:
    home = "/".join(("", "home", "me", "secret-place", "model"))
    token = "hf_" + "a1B2" * 8
    record(tmp_path)
    configuration = {
        "base_model": home,
        "datasets": [{"path": f"https://me:{token}@x.org/p.jsonl"}],
        "bdpo_recipe": {"licence": "me@x.org", "base_model": token, "data": {"command": token}},
    }
    complete_card(tmp_path, BDPOSettings(), configuration=configuration)
    for hidden in ("secret-place", token, "x.org", str(tmp_path)):
        assert hidden not in text(tmp_path)


@pytest.mark.parametrize("lora", [True, False])
def test_the_quick_start_runs(lora, tmp_path, monkeypatch, capsys) -> None:
    """On a model of this machine, from the folder that the training ran in."""
    monkeypatch.chdir(tmp_path)
    base = write(Path("tiny"), steps=0, hidden_size=32, layers=1, progress=False)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    made = trainer(output_dir="run", model=model, lora=lora, max_steps=1)
    made.train()
    made.save_model()
    made.create_model_card("a model")
    shown = text(Path("run"))
    assert "None" not in shown
    (code,) = re.findall(r"```python\n(.*?)```", shown, re.S)
    assert ("PeftModel" in code) is lora
    capsys.readouterr()
    exec(code.replace("=128", "=8"), {})
    assert capsys.readouterr().out
