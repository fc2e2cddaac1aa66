"""Settings that must give the same run as DPO, and settings that must not."""

from functools import cache

import pytest
import torch
from cases import first
from running import ABLATIONS, history, trainer, weights
from transformers import TrainerCallback
from trl import DPOTrainer

from bdpo_plugin import BDPOTrainer

SAME = 1e-5


def run(cls=None, output_dir="run", **options):
    made = trainer(**({"cls": cls} if cls else {}), output_dir=output_dir, **options)
    made.train()
    return made


@pytest.fixture(scope="module")
def over_20_steps(tmp_path_factory):
    """TRL's own DPO with LoRA or full, and the options of both."""

    @cache
    def dpo(lora):
        # Adam's usual epsilon makes steps of up to the learning rate of gradients that are rounding
        options = {"adam_epsilon": 1e-5, "learning_rate": 1e-3 if lora else 1e-4}
        options |= {"lora": lora, "max_steps": 20}
        return run(DPOTrainer, tmp_path_factory.mktemp("dpo"), **options), options

    return dpo


def assert_same(ours, theirs):
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=1e-6, abs=SAME)
    for name in ("logps/chosen", "logps/rejected", "entropy", "logits/chosen", "logits/rejected"):
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=SAME, abs=SAME)
    for name in ("mean_token_accuracy", "num_tokens"):
        assert history(ours, name) == pytest.approx(history(theirs, name))
    wanted = weights(theirs)
    for name, parameter in weights(ours).items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=SAME)


@pytest.mark.parametrize(
    ("lora", "precompute"),
    first(2, [(True, True), (False, False), (True, False), (False, True)]),
    ids=["lora-precomputed", "full-stepwise", "lora-stepwise", "full-precomputed"],
)
def test_alpha_0_is_dpo_over_20_steps(tmp_path, over_20_steps, lora, precompute):
    theirs, options = over_20_steps(lora)
    ref_model = None
    if not lora and not precompute:
        from running import sharp_model

        ref_model = sharp_model()
    ours = run(
        output_dir=tmp_path,
        ref_model=ref_model,
        bdpo_alpha=0,
        bdpo_precompute=precompute,
        **options,
    )
    assert len(history(ours, "loss")) == 20
    assert_same(ours, theirs)
    assert not any("bdpo/mi_chosen" in entry for entry in ours.state.log_history)
    assert history(ours, "bdpo/weight_chosen") == [1] * 20


@pytest.mark.parametrize(
    "losses",
    [
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ],
    ids=lambda losses: "+".join(losses["loss_type"]),
)
def test_both_switches_off_is_dpo_for_every_loss(tmp_path, losses):
    # Adam makes a step of the learning rate's size of any gradient, one of pure rounding too
    plain = {"optim": "sgd", "learning_rate": 1e-2}
    theirs = run(DPOTrainer, tmp_path / "dpo", **plain, **losses)
    ours = run(output_dir=tmp_path / "bdpo", **ABLATIONS["DPO"], **plain, **losses)
    assert history(ours, "loss")[0] != history(ours, "loss")[-1]
    assert_same(ours, theirs)


class SeedOfEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def test_the_noise_of_neftune_is_dpos(tmp_path):
    """It is drawn for every token of a batch, padding included, and scaled by its width. (What the
    reference says is not compared: TRL's has the noise too.)"""
    runs = []
    for cls, keys in ((DPOTrainer, {"precompute_ref_log_probs": True}), (BDPOTrainer, {})):
        made = trainer(cls, tmp_path, max_steps=1, neftune_noise_alpha=5.0, **keys)
        made.add_callback(SeedOfEachStep())
        made.train()
        runs.append(made)
    theirs, ours = runs
    assert abs(history(ours, "rewards/chosen")[0]) > 1e-3, "the noise is there"
    for name in ("logps/chosen", "logps/rejected", "entropy"):
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=SAME)


def test_the_four_ablations_are_four_runs(tmp_path):
    losses = {
        name: history(run(output_dir=tmp_path / name, **switches), "loss")
        for name, switches in ABLATIONS.items()
    }
    names = list(losses)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            difference = max(
                abs(a - b) for a, b in zip(losses[one][1:], losses[other][1:], strict=True)
            )
            assert difference > 1e-4, (one, other)


def test_stepwise_is_precomputed(tmp_path):
    ahead = run(output_dir=tmp_path / "a")
    stepwise = run(output_dir=tmp_path / "b", bdpo_precompute=False)
    for name in ("loss", "bdpo/mi_chosen", "bdpo/mi_rejected", "bdpo/weight_chosen", "bdpo/scale"):
        assert history(stepwise, name) == pytest.approx(history(ahead, name), abs=SAME)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_at_step_0_every_reward_is_0(tmp_path, lora):
    made = run(output_dir=tmp_path, lora=lora, max_steps=1)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert history(made, name)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, gradient_checkpointing):
    plain = run(output_dir=tmp_path / "a", gradient_checkpointing=not gradient_checkpointing)
    other = run(output_dir=tmp_path / "b", gradient_checkpointing=gradient_checkpointing)
    assert_same(other, plain)
