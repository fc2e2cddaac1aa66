"""LLaMA-Factory's numbers against tests/truth.py in float64, and against the other hosts."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("llamafactory")

import cross_host
import torch
import truth
from datasets import Dataset, DatasetDict
from llamafactory_runs import curve, run, scores
from peft import PeftModel
from real_runs import as_function
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

COUNT = 8
#: The whole dataset is one batch, so that its order does not matter.
WHOLE = {"max_samples": COUNT, "per_device_train_batch_size": COUNT}


def load(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)


def tokens(tiny, end="<|im_end|>\n"):
    """(prompt, chosen, rejected) ids of each pair, from the text in ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    for line in (tiny / "train.jsonl").read_text().splitlines()[:COUNT]:
        pair = json.loads(line)
        query = pair["messages"][0]["content"]
        prompt = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
        sides = (f"{pair[side]['content']}{end}" for side in ("chosen", "rejected"))
        yield tuple(tokenizer(text)["input_ids"] for text in (prompt, *sides))


@pytest.mark.parametrize(
    "settings",
    [
        {"bdpo_alpha": 1.5},
        {"bdpo_weighting": "power", "bdpo_alpha": 0.7},
        {"bdpo_mi_estimator": "expected", "bdpo_scaling": False},
        {"bdpo_mi_normalize": False, "bdpo_alpha": 0.05, "bdpo_balance": False},
    ],
    ids=["softmax", "power", "expected-BW", "nats-SF"],
)
def test_scores_weights_and_losses(tiny, tmp_path, settings):
    done = run(
        tiny,
        tmp_path / "run",
        **WHOLE,
        **settings,
        pref_beta=0.3,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=1,
    )
    prompts, chosen, rejected = map(list, zip(*tokens(tiny), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    null = tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    reference = as_function(load(tiny))
    truths = [
        truth.score_pair(
            reference,
            x,
            null,
            y_w,
            y_l,
            estimator=settings.get("bdpo_mi_estimator", "pointwise"),
            normalize=settings.get("bdpo_mi_normalize", True),
        )
        for x, y_w, y_l in zip(prompts, chosen, rejected, strict=True)
    ]
    switches = {key.removeprefix("bdpo_"): v for key, v in settings.items() if "mi_" not in key}
    saved = scores(done)
    assert saved["row"] == list(range(COUNT))
    for row, score in enumerate(truths):
        balance = truth.balance_pair(score.mi_chosen, score.mi_rejected, **switches)
        for name, value in {**score._asdict(), **balance._asdict()}.items():
            # summed in float32 over a response; `power` divides by that, whatever is small
            of_weights = 5e-5 if settings.get("bdpo_weighting") == "power" else 1e-5
            tolerance = of_weights if name.startswith(("weight", "scale")) else 2e-4
            assert saved[name][row] == pytest.approx(value, rel=1e-5, abs=tolerance), (name, row)

    logged = curve(done, "loss")
    for step in (1, 2):  # at step 0 the policy is the reference
        policy = PeftModel.from_pretrained(load(tiny), done / f"checkpoint-{step}")
        expected = truth.batch_loss(
            as_function(policy), prompts, chosen, rejected, truths, beta=0.3, **switches
        )
        assert logged[step] == pytest.approx(expected, abs=1e-5)


_OTHERS = [path for path in os.environ.get("BDPO_OTHER_HOSTS", "").split(os.pathsep) if path]


@pytest.mark.skipif(not _OTHERS, reason="BDPO_OTHER_HOSTS names no other environment's python")
@pytest.mark.parametrize("python", _OTHERS, ids=lambda path: Path(path).parts[-3])
def test_other_hosts_give_the_same(tiny, tmp_path, python):
    """A full fine-tune on the same pairs: the same scores, weights, and losses of three steps."""
    command = [python, cross_host.__file__, str(tiny), str(tmp_path / "theirs"), str(COUNT)]
    environment = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result = json.loads((tmp_path / "theirs" / "result.json").read_text())

    save_tokens(tokens(tiny, result["end"]), tmp_path / "tokens")
    ours = run(
        tiny,
        tmp_path / "ours",
        tokenized_path=str(tmp_path / "tokens"),
        finetuning_type="full",
        pref_beta=cross_host.BETA,
        **cross_host.SHARED,
    )
    theirs, mine = scores(tmp_path / "theirs"), scores(ours)
    for name, column in mine.items():
        assert theirs[name] == pytest.approx(column, rel=1e-5, abs=1e-5), name
    assert result["losses"] == pytest.approx(curve(ours, "loss"), abs=1e-5)
    assert result["losses"][-1] < result["losses"][0] - 0.05


def save_tokens(triples, directory):
    """A dataset as LLaMA-Factory itself saves it, tokenised."""
    rows = []
    for prompt, *sides in triples:
        row = dict.fromkeys(("images", "videos", "audios"))
        for name, response in zip(("chosen", "rejected"), sides, strict=True):
            row[f"{name}_input_ids"] = prompt + response
            row[f"{name}_attention_mask"] = [1] * len(prompt + response)
            row[f"{name}_labels"] = [-100] * len(prompt) + response
        rows.append(row)
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(directory)
