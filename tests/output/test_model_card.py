"""The README.md that a run leaves behind."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from running import scores, trainer

from bdpo_plugin import BDPOSettings
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
