"""A run that is resumed goes on as if it had never stopped, or is refused with the reason."""

import copy
import json
import shutil
from pathlib import Path

import cases
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from running import history, pairs, sharp_model, trainer

from bdpo_plugin import BDPOError
from bdpo_plugin.reference import fingerprint
from bdpo_plugin.training.checkpoints import FILE

LINEAR = ["q_proj", "v_proj"]
OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 5e-3}
ADAPTERS = {
    "full": lambda: False,
    "lora": lambda: LoraConfig(r=4, target_modules=LINEAR),
    "dora": lambda: LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "modules_to_save": lambda: LoraConfig(
        r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]
    ),
    "new tokens": lambda: LoraConfig(
        r=4, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [7, 8]}
    ),
    "ia3": lambda: IA3Config(
        target_modules=[*LINEAR, "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: LoHaConfig(r=4, target_modules=LINEAR),
    "vera": lambda: VeraConfig(r=4, target_modules=LINEAR),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def kinds(*names):
    """Of the kinds of adapters, the most common are enough for the inner loop, and three more for
    `make test`."""
    common, less = ("full", "lora"), ("new tokens", "ia3", "prompt")
    marks = [pytest.mark.slow, pytest.mark.exhaustive]
    return [
        name if name in common else pytest.param(name, marks=marks[: 1 if name in less else 2])
        for name in names
    ]


def resumed(tmp_path, make):
    """What an undisturbed run logs after its checkpoint, and what one logs that resumes there."""
    whole = make(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "again" / "checkpoint-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", checkpoint)
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    names = ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins")
    return whole, {n: history(whole, n) for n in names}, {n: history(again, n) for n in names}


@pytest.mark.parametrize("kind", kinds(*ADAPTERS))
def test_each_kind_of_adapter_goes_on_where_it_was(tmp_path, kind):
    def make(output_dir):
        return trainer(
            output_dir=output_dir,
            lora=ADAPTERS[kind](),
            evaluation=pairs(6, seed=3),
            eval_strategy="steps",
            eval_steps=2,
            gradient_checkpointing=kind != "prefix",  # the host drops the prefix in it
            **OPTIONS,
        )

    _, wanted, found = resumed(tmp_path, make)
    assert len(wanted["loss"]) == 4
    assert found == wanted


@pytest.mark.parametrize("precompute", cases.first(1, [True, False]))
@pytest.mark.parametrize(
    "kind", kinds("lora", "modules_to_save", "new tokens", "ia3", "loha", "vera")
)
def test_a_given_adapter_goes_on_where_it_was(tmp_path, kind, precompute):
    torch.manual_seed(1)
    given = get_peft_model(sharp_model(), ADAPTERS[kind]())
    with torch.no_grad():  # as one that has been trained
        for name, parameter in given.named_parameters():
            if ".default" in name and "original" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))

    def make(output_dir):
        return trainer(
            output_dir=output_dir,
            model=copy.deepcopy(given),
            lora=False,
            evaluation=pairs(6, seed=3),
            eval_strategy="steps",
            eval_steps=2,
            bdpo_precompute=precompute,
            **OPTIONS,
        )

    whole, wanted, found = resumed(tmp_path, make)
    assert found == wanted
    assert wanted["rewards/margins"][0] == pytest.approx(0, abs=1e-4)
    if precompute:
        assert not (tmp_path / "whole" / "checkpoint-2" / "ref").exists()
        with pytest.raises(BDPOError, match="copy of the adapter given\\) was released"):
            whole.evaluate(pairs(5, seed=8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(output_dir=folder, **OPTIONS | {"max_steps": 2}).train()
    return folder / "checkpoint-2"


def make(output_dir, **changes):
    return trainer(output_dir=output_dir, **OPTIONS | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bdpo_alpha": 0.5}, "`bdpo_alpha`: 1.5 there, 0.5 here"),
        ({"bdpo_weighting": "power"}, "`bdpo_weighting`: softmax there, power here"),
        ({"bdpo_mi_estimator": "expected"}, "bdpo_mi_estimator"),
        ({"bdpo_null_prompt": "Question:"}, "null prompt"),
        ({"beta": 0.5}, "`beta`: 0.1 there, 0.5 here"),
        ({"loss_type": "hinge"}, "hinge"),
        ({"dataset": pairs(24, seed=6)}, "training pairs"),
        ({"model": "other"}, "reference"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, checkpoint, changes, words):
    if "model" in changes:
        changes = {"model": sharp_model(seed=5)}
    made = make(tmp_path, **changes)
    with pytest.raises(BDPOError, match="cannot be continued") as caught:
        made.train(resume_from_checkpoint=str(checkpoint))
    assert words in str(caught.value)
    assert made.state.global_step == 0


@pytest.mark.parametrize(
    "changes", [{"bdpo_score_tokens": 64}, {"bdpo_cache_dir": "x"}, {"bdpo_precompute": False}]
)
def test_what_changes_no_number_may_change(tmp_path, checkpoint, changes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path, **changes)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert made.state.global_step == 4


def test_another_computation_of_the_same_reference_is_told_and_goes_on(
    tmp_path, checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(fingerprint, "VERSION", fingerprint.VERSION + 1)
    made = make(tmp_path / "run")
    capsys.readouterr()
    made.train(resume_from_checkpoint=str(checkpoint))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "but not what computes with them" in out
    assert made.state.global_step == OPTIONS["max_steps"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("trainer_state.json", "killed while it saves"),
        ("optimizer.pt", "save_only_model"),
        (FILE, "not written by a B-DPO run"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, checkpoint, file, words):
    copied = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copied)
    (copied / file).unlink()
    with pytest.raises(BDPOError, match=words):
        make(tmp_path).train(resume_from_checkpoint=True)
    (copied / FILE).write_text("{")
    with pytest.raises(BDPOError, match="cannot be continued"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(BDPOError, match="no checkpoint in"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(BDPOError, match="There is no checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_saved_weights_say_what_they_were_trained_with(tmp_path):
    made = make(tmp_path, max_steps=1)
    made.save_model(str(tmp_path / "final"))
    said = json.loads(Path(tmp_path, "final", FILE).read_text())
    assert said["settings"]["bdpo_alpha"] == 1.5
    assert said["loss"] == {
        "types": ["sigmoid"],
        "weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
    }
    assert said["reference"]
    assert said["training pairs"]
