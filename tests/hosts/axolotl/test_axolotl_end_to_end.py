"""Axolotl's command line, from the YAML to the finished model."""

import json
import re
import sys

import pytest
import torch

pytest.importorskip("axolotl")

import yaml
from axolotl_runs import MODELS, axolotl, script, server, write_config
from cases import first
from huggingface_hub import ModelCard
from peft import PeftModel
from real_runs import make_tiny, mean_log_probability, run_command, weights
from running import scores
from transformers import AutoModelForCausalLM

from bdpo_plugin.cli.load_trained import load_trained, load_trained_tokenizer

pytestmark = pytest.mark.slow

SAVE = {"save_strategy": "steps", "saves_per_epoch": None}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def history(directory, step):
    state = json.loads((directory / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return state["log_history"]


#: `axolotl inference`, to which a question is typed.
ASK = """
import io
import sys
from axolotl.cli.main import main

sys.stdin = io.StringIO(sys.argv.pop(1))
sys.argv[0] = "axolotl"
main()
"""


def ask(config, question, *options):
    words = [question, "inference", config, "--launcher", "python", *options]
    return run_command([sys.executable, "-c", ASK, *map(str, words)], {}, server()).stdout


def curve(entries, name):
    return [entry[name] for entry in entries if name in entry]


@pytest.mark.parametrize(
    ("run", "setup"),
    first(1, [(axolotl, {"adapter": None, "learning_rate": 1e-4}), (script, {})]),
    ids=["full, command line", "lora, script"],
)
def test_alpha_0_is_dpo_over_20_steps(tiny, tmp_path, run, setup):
    """With an epsilon above the rounding of the gradients: of a smaller one, which differs between
    a padded and a packed batch, Adam makes steps of up to the learning rate. The command is cold,
    with Axolotl's own default for the launcher."""
    steps = {"max_steps": 20, "save_steps": 20, "num_epochs": 3}
    same = {**SAVE, **setup, **steps, "adam_epsilon": 1e-5}
    for name, key in {
        "dpo": {"rl": "dpo", "plugins": None},
        "bdpo": {"rl": "bdpo", "bdpo_alpha": 0},
    }.items():
        config = write_config(tmp_path / f"{name}.yml", tiny, **same, **key)
        _ = run("train", config, cold=True) if run is axolotl else run(config)
    theirs, ours = (history(tmp_path / name, 20) for name in ("dpo", "bdpo"))
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert len(curve(theirs, name)) == 20
        assert curve(ours, name) == pytest.approx(curve(theirs, name), abs=1e-5), name
    trained = weights(tmp_path / "dpo")
    for name, tensor in weights(tmp_path / "bdpo").items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-5)


@pytest.mark.exhaustive  # four ablations in one process: tests/hosts/trl/test_equivalence.py
def test_a_sweep_over_the_ablations_costs_one_pass_and_gives_four_curves(tiny, tmp_path):
    sweep = tmp_path / "sweep.yml"
    sweep.write_text(yaml.safe_dump({"bdpo_balance": [True, False], "bdpo_scaling": [True, False]}))
    config = write_config(tmp_path / "base.yml", tiny, **SAVE, save_steps=4)
    out = axolotl("train", config, "--sweep", sweep, "--launcher", "python").stdout
    assert (
        re.findall(r"32: (\d+) scored now, (\d+) reused", out) == [("32", "0")] + [("0", "32")] * 3
    )
    runs = sorted(tmp_path.rglob("checkpoint-4"))
    assert len(runs) == 4
    curves = [curve(history(run.parent, 4), "loss") for run in runs]
    for i, one in enumerate(curves):
        for other in curves[i + 1 :]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-4


@pytest.mark.parametrize(
    "setup",
    first(
        1,
        [
            {
                "adapter": "qlora",
                "load_in_4bit": True,
                "attn_implementation": "sdpa",
                "gradient_checkpointing": True,
            },
            {"adapter": "lora", "attn_implementation": "eager", "gradient_checkpointing": True},
            {"adapter": None, "attn_implementation": "sdpa", "gradient_checkpointing": False},
        ],
    ),
    ids=["qlora-sdpa-gc", "lora-eager-gc", "full-sdpa"],
)
def test_trains_evaluates_saves_and_resumes(tiny, tmp_path, setup):
    data = {"ds_type": "json", "type": "chat_template.default", "split": "train"}
    options = {
        **SAVE,
        **setup,
        "save_steps": 2,
        "eval_steps": 2,
        "learning_rate": 1e-3 if setup["adapter"] else 1e-4,
        "test_datasets": [{"path": str(tiny / "eval.jsonl"), **data}],
    }
    out = axolotl(
        "train", write_config(tmp_path / "run.yml", tiny, **options), "--launcher", "python"
    ).stdout
    run = tmp_path / "run"
    assert ("adapter off" if setup["adapter"] else "separate model") in out
    entries = history(run, 4)
    assert len(curve(entries, "loss")) == 4
    assert len(curve(entries, "bdpo/scale")) == 4
    assert len(curve(entries, "eval_bdpo/scale")) >= 2
    rounding = 1e-4 if "load_in_4bit" not in setup else 2e-2  # QLoRA computes in half precision
    assert curve(entries, "rewards/margins")[0] == pytest.approx(0, abs=rounding)
    assert curve(entries, "loss")[-1] != curve(entries, "loss")[0]
    assert len(scores(run)["row"]) == 32
    assert len(scores(run, "reference_scores.eval.parquet")["row"]) == 8
    if setup["adapter"]:  # what `bdpo answers` shows is the model that was trained
        base = str(tiny / "model")
        shown = load_trained(base, run), load_trained_tokenizer(base, run)
        found = mean_log_probability(*shown, tiny / "eval.jsonl", "<|im_end|>")
        assert found == pytest.approx(curve(entries, "eval_logps/chosen")[-1], rel=1e-3)

    whole = weights(run)
    assert whole
    config = write_config(
        tmp_path / "run.yml", tiny, resume_from_checkpoint=str(run / "checkpoint-2"), **options
    )
    out = axolotl("train", config, "--launcher", "python").stdout
    assert "32: 0 scored now, 32 reused" in out
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5)


def test_what_was_trained_is_evaluated_and_merged(tiny, tmp_path):
    """Row numbers are those of the file, of which Axolotl makes a table in another order."""
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    for number in (5, 11):
        rows[number]["rejected"] = rows[number]["chosen"]
    data = {"ds_type": "json", "type": "chat_template.default", "split": "train"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path / "run.yml",
        tiny,
        datasets=[{"path": str(tmp_path / "train.jsonl"), **data}],
        test_datasets=[{"path": str(tiny / "eval.jsonl"), **data}],
        **{**SAVE, "save_steps": 4, "eval_steps": 4},
    )
    run = tmp_path / "run"
    out = axolotl("train", config, "--launcher", "python").stdout
    assert "32 pairs of the train data: chosen and rejected are identical (dropped; rows" in out
    (numbers,) = re.findall(r"rows\W+(\d+), (\d+)\)", out)
    assert sorted(map(int, numbers)) == [5, 11]
    last = [entry for entry in history(run, 4) if "eval_loss" in entry][-1]

    refused = ["evaluate", config, "--launcher", "python"]
    with pytest.raises(AssertionError, match=f"Type: axolotl evaluate .* --lora-model-dir {run}"):
        axolotl(*refused)
    out = axolotl(*refused, "--lora-model-dir", run).stdout
    evaluated = {
        name: float(value) for name, value in re.findall(r"(eval_[\w/]+): (-?[\d.]+)", out)
    }
    for name in ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "bdpo/scale"):
        assert evaluated[f"eval_{name}"] == pytest.approx(last[f"eval_{name}"], abs=1e-5), name
    assert abs(evaluated["eval_rewards/margins"]) > 1e-4

    # Axolotl turns these on where there is no `rl`, which inference takes away; they need a GPU
    kernels = (f"--no-lora-{part}-kernel" for part in ("mlp", "qkv", "o"))
    answers = ask(config, "What is tea?", "--lora-model-dir", run, *kernels)
    assert "What is tea?" in answers.rsplit("=" * 80, 3)[-3]  # the prompt and what comes after it

    axolotl("merge-lora", config, "--lora-model-dir", run)
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    before = base(ids).logits
    trained = PeftModel.from_pretrained(base, run)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)
    assert (trained - before).abs().max() > 1e-2
    # as the refusal says of a training that is to go on from it
    with pytest.raises(AssertionError, match=r"`lora_model_dir: .*` has no effect with `rl: bdpo`"):
        axolotl("train", config, "--launcher", "python", "--lora-model-dir", run)
    go_on = ("--base-model", run / "merged", "--output-dir", tmp_path / "on", "--max-steps", "1")
    axolotl("train", config, "--launcher", "python", *go_on)


@pytest.mark.exhaustive
def test_preprocess_then_torchrun(tiny, tmp_path):
    config = write_config(tmp_path / "run.yml", tiny)
    axolotl("preprocess", config)
    assert not (tmp_path / "run" / "bdpo").exists()
    out = axolotl("train", config, "--launcher", "torchrun", "--", "--nproc_per_node", "1").stdout
    assert "32: 32 scored now" in out
    assert len(scores(tmp_path / "run")["row"]) == 32

    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert {"bdpo", "dpo", "axolotl", "trl"} <= set(ModelCard(card).data.tags)
    assert "trained with B-DPO" in card
    assert "rafailov2023direct" not in card
    assert "<summary>The configuration</summary>" in card
    assert "rl: bdpo" in card


@pytest.mark.parametrize(("rl", "models"), first(1, [("bdpo", 1), ("dpo", 2)]))
def test_a_full_fine_tune_holds_no_second_model(tiny, tmp_path, rl, models):
    """Nor does it need its file: with the keys of a script there is a temporary one, which is gone
    (as in Ray's workers), and a tuple, which no YAML has."""
    config = write_config(tmp_path / "run.yml", tiny, adapter=None, rl=rl, my_key="mine")
    out = script(config, MODELS).stdout
    assert f"{models} models in memory" in out
    if rl == "bdpo":
        assert "'lora_target_modules': ['q_proj', 'v_proj']" in out
        assert "'sequence_len': 256" in out
        assert "'my_key'" not in out.partition("recorded: ")[2]
