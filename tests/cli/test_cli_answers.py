"""`bdpo answers` shows an adapter on the base as it was trained: quantised, with its vocabulary,
its tokenizer and its template."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes")

from commandline import bdpo
from guarded import nothing_but
from running import trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bdpo_plugin.cli.load_trained import load_trained, load_trained_tokenizer
from bdpo_plugin.demo.tiny import write

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"), steps=0, hidden_size=64, layers=1, progress=False)


def train(base, folder, *, quantised=None, added=(), **options):
    """A run of two steps on a base with further tokens; the logits of its model."""
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    loading = {"quantization_config": BitsAndBytesConfig(**quantised)} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(
        base / "model", dtype=torch.float32, attn_implementation="eager", **loading
    )
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
    run = trainer(
        output_dir=folder,
        model=model,
        tokenizer=tokenizer,
        max_steps=2,
        learning_rate=5e-2,
        save_strategy="steps",
        save_steps=2,
        gradient_checkpointing=False,
        **options,
    )
    run.train()
    run.save_model()
    with torch.no_grad():
        return run.model.eval()(IDS).logits


def logits(base, folder):
    with torch.no_grad():
        return load_trained(str(base / "model"), folder)(IDS).logits


@pytest.fixture(scope="module")
def qlora(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora") / "run"
    return folder, train(base, folder, quantised=FOUR_BITS)


def test_the_base_is_quantised_as_it_was(base, qlora, tmp_path) -> None:
    folder, trained = qlora
    for place in (folder, folder / "checkpoint-2"):
        torch.testing.assert_close(logits(base, place), trained, rtol=1e-5, atol=1e-5)
    # what this is about: on the base as it is saved, the adapter makes another model
    shutil.copytree(folder, tmp_path / "run")
    record = tmp_path / "run/bdpo/run.json"
    known = json.loads(record.read_text())
    assert known["quantization"]["bnb_4bit_quant_type"] == "nf4"
    record.write_text(json.dumps(known | {"quantised": False, "quantization": None}))
    assert (logits(base, tmp_path / "run") - trained).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_other_ways_to_quantise(base, tmp_path, settings) -> None:
    if "load_in_4bit" in settings:
        settings |= {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16}
    trained = train(base, tmp_path / "run", quantised=settings)
    torch.testing.assert_close(logits(base, tmp_path / "run"), trained, rtol=1e-3, atol=1e-3)


def test_of_a_run_that_does_not_say_how_it_was_quantised(base, qlora, tmp_path) -> None:
    """An earlier release's, which is refused; and one without B-DPO, of which the host has left the
    configuration of the model."""
    folder, trained = qlora
    shutil.copytree(folder, tmp_path / "run")
    record = tmp_path / "run/bdpo/run.json"
    known = json.loads(record.read_text())
    settings = known.pop("quantization")
    record.write_text(json.dumps(known))
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\n")
    code, shown = bdpo(
        *("answers", str(base / "model"), str(tmp_path / "run")),
        *("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "1"),
    )
    assert code == 1
    assert "was trained on quantised weights by an earlier release" in shown
    shutil.rmtree(tmp_path / "run/bdpo")
    config = {"model_type": "qwen2", "quantization_config": settings}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(base, tmp_path / "run"), trained, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def grown(base, tmp_path_factory):
    """A run that added tokens, whose tokenizer has another template."""
    folder = tmp_path_factory.mktemp("grown") / "run"
    return folder, train(base, folder, added=("<|one|>", "<|two|>"))


def test_the_vocabulary_of_the_run(base, grown, capsys) -> None:
    folder, trained = grown
    torch.testing.assert_close(logits(base, folder), trained, rtol=1e-5, atol=1e-5)
    assert len(load_trained_tokenizer(str(base / "model"), folder)) == trained.shape[-1]
    assert "warning" not in capsys.readouterr().err


def test_the_template_of_the_run_for_a_base_without_one(base, grown, tmp_path) -> None:
    """The same adapter on the base in another place: it is told."""
    folder, _ = grown
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\n")
    code, shown = bdpo(
        *("answers", str(tmp_path / "model"), str(folder)),
        *("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "2"),
    )
    assert code == 0, shown
    assert f"was trained on {base / 'model'}, and is shown on {tmp_path / 'model'}" in shown


def test_an_adapter_of_another_model(grown, tmp_path) -> None:
    folder, _ = grown
    other = write(tmp_path / "other", steps=0, hidden_size=32, layers=1, progress=False) / "model"
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\n")
    asked = ("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "1")
    code, shown = bdpo("answers", str(other), str(folder), *asked)
    assert code == 1
    assert f"the adapter of {folder} cannot be put on {other} (it was trained on " in shown


@pytest.mark.parametrize("name", ["nowhere", "org/none-such", "empty", "prompts.txt"])
def test_a_base_that_is_no_model(grown, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\n")
    code, shown = bdpo("answers", name, str(grown[0]), "--prompts", "prompts.txt")
    assert code == 1
    (line,) = [line for line in shown.splitlines() if line.strip()]
    assert line.startswith(f"Error: BASE {name} is no model that can be loaded: ")


def test_they_write_nothing_but_the_pictures_and_ask_nobody(
    base, qlora, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "all"
    shutil.copytree(qlora[0], folder / "run")
    prompts = folder / "prompts.txt"
    prompts.write_text("How do I bake bread?\n")
    out = folder / "pictures"
    asked = ("--prompts", str(prompts), "--max-new-tokens", "1")
    with nothing_but(folder, out, monkeypatch=monkeypatch):
        for command in (
            ("compare", str(folder / "run")),
            ("plot", str(folder / "run"), "--out", str(out)),
            ("answers", str(base / "model"), str(folder / "run"), *asked),
        ):
            code, shown = bdpo(*command)
            assert code == 0, shown
    assert {path.name for path in out.iterdir()} == {"curves.png", "mi_scatter.png"}


def test_what_an_interrupted_command_has_started_ends_with_it() -> None:
    """And so writes into no folder that is gone: a launcher and the process that it starts."""
    sleeper = "import time; time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
        "print('started', flush=True)\n"
        "process.wait()\n"
    )
    ours = (
        "import signal, sys\n"
        # a shell's background job has it ignored, and hands that on
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bdpo_plugin.cli.recipes.run import start\n"
        f"start([sys.executable, '-c', {launcher!r}], sys.stdout)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", ours], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", None)  # whose end all of them hold open
