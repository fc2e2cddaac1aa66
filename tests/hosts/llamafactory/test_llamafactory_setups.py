"""The ways to train that LLaMA-Factory has, and which model is the reference in each."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("llamafactory")

import torch
from cases import first
from llamafactory_runs import curve, run, scores
from real_runs import mean_log_probability, weights
from torch.testing import assert_close

from bdpo_plugin.cli.load_trained import load_trained, load_trained_tokenizer

pytestmark = pytest.mark.slow

FULL = {"finetuning_type": "full", "learning_rate": 1e-4}
FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-4}
QLORA = {"quantization_bit": 4, "quantization_method": "bnb"}


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """A LoRA adapter of the tiny model that has learnt something."""
    directory = tmp_path_factory.mktemp("adapter") / "run"
    return run(tiny, directory, pref_loss="sigmoid", learning_rate=5e-3, max_steps=4)


@pytest.mark.parametrize(
    ("setup", "reference"),
    first(
        3,
        [
            (QLORA, "adapter off"),
            (FULL, "a second copy of"),
            ({"bdpo_precompute": False}, "adapter off"),
            ({}, "adapter off"),
            (FREEZE, "a second copy of"),
            ({**FULL, "bdpo_precompute": False}, "a second copy of"),
        ],
    ),
    ids=["qlora", "full", "lora-stepwise", "lora", "freeze", "full-stepwise"],
)
def test_trains_evaluates_saves_and_resumes(tiny, tmp_path, capfd, setup, reference):
    options = {
        **setup,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": "eval",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "do_eval": True,
    }
    whole = run(tiny, tmp_path / "run", **options)
    assert reference in capfd.readouterr().out
    margins = curve(whole, "rewards/margins")
    assert len(margins) == len(curve(whole, "bdpo/scale")) == 4
    assert margins[0] == pytest.approx(0, abs=2e-2 if "quantization_bit" in setup else 1e-4)
    assert margins[-1] != margins[0]
    assert len(curve(whole, "eval_bdpo/scale")) == 2
    final = json.loads((whole / "eval_results.json").read_text())
    assert final["eval_bdpo/scale"] == curve(whole, "eval_bdpo/scale")[-1] < 1
    assert final["eval_loss"] == curve(whole, "eval_loss")[-1]
    if setup.get("bdpo_precompute", True):
        assert len(scores(whole)["row"]) == 32
        assert len(scores(whole, "reference_scores.eval.parquet")["row"]) == 8

    if "quantization_bit" in setup:  # what `bdpo answers` shows is the model that was trained
        base = str(tiny / "model")
        shown = load_trained(base, whole), load_trained_tokenizer(base, whole)
        found = mean_log_probability(*shown, tiny / "eval.jsonl", "<|im_end|>\n")
        assert found == pytest.approx(curve(whole, "eval_logps/chosen")[-1], rel=1e-3)

    trained, losses = weights(whole), curve(whole, "loss")
    run(tiny, whole, resume_from_checkpoint=str(whole / "checkpoint-2"), **options)
    out = capfd.readouterr().out
    if setup.get("bdpo_precompute", True):
        assert "32: 0 scored now, 32 reused" in out
    assert curve(whole, "loss") == pytest.approx(losses, abs=1e-5)
    for name, tensor in weights(whole).items():
        assert_close(tensor, trained[name], rtol=0, atol=1e-5)


def test_scoring_before_or_in_each_step_is_the_same(tiny, tmp_path):
    before = run(tiny, tmp_path / "before")
    during = run(tiny, tmp_path / "during", bdpo_precompute=False)
    for name in ("loss", "bdpo/imbalance", "rewards/margins"):
        assert curve(during, name) == pytest.approx(curve(before, name), abs=1e-5), name


def test_pairs_of_similar_length_share_a_batch(tiny, tmp_path):
    """LLaMA-Factory's own DPO stops for want of a column with the lengths."""
    run(tiny, tmp_path / "run", train_sampling_strategy="group_by_length")
    assert len(curve(tmp_path / "run", "rewards/margins")) == 3


@pytest.mark.parametrize("setup", first(1, [FULL, FREEZE, QLORA]), ids=["full", "freeze", "qlora"])
def test_alpha_0_is_sigmoid(tiny, tmp_path, setup):
    ours = run(tiny, tmp_path / "bdpo", bdpo_alpha=0, max_steps=4, **setup)
    theirs = run(tiny, tmp_path / "sigmoid", pref_loss="sigmoid", max_steps=4, **setup)
    # QLoRA computes in half precision, and sums what it reads in another order
    tolerance = 5e-3 if setup is QLORA else 1e-5
    for name in ("loss", "rewards/chosen", "rewards/margins"):
        assert curve(ours, name) == pytest.approx(curve(theirs, name), abs=tolerance), name


def test_sft_term_is_llama_factorys(tiny, tmp_path):
    with_term = {"pref_ftx": 0.5, "max_steps": 4}
    ours = run(tiny, tmp_path / "bdpo", bdpo_alpha=0, **with_term)
    theirs = run(tiny, tmp_path / "sigmoid", pref_loss="sigmoid", **with_term)
    assert curve(ours, "loss") == pytest.approx(curve(theirs, "loss"), abs=1e-5)
    assert curve(ours, "loss")[0] > 1


def test_reference_model_of_its_own(tiny, adapter, tmp_path, capfd):
    own = {"ref_model": str(tiny / "model"), "ref_model_adapters": str(adapter)}
    ours = run(tiny, tmp_path / "bdpo", bdpo_alpha=0, **own)
    assert f"`ref_model` {tiny}/model with {adapter} merged into it" in _joined(capfd)
    theirs = run(tiny, tmp_path / "sigmoid", pref_loss="sigmoid", **own)
    assert abs(curve(theirs, "rewards/chosen")[0]) > 1e-2
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert curve(ours, name) == pytest.approx(curve(theirs, name), abs=1e-5), name


@pytest.mark.parametrize(
    ("new", "reference"),
    [
        (False, "model, adapter off (training continues from {adapter})"),
        (True, "model with {adapter} merged into it, adapter off"),
    ],
    ids=["continue", "merge"],
)
def test_adapter_to_continue_from(tiny, adapter, tmp_path, capfd, new, reference):
    given = {"adapter_name_or_path": str(adapter), "create_new_adapter": new}
    ours = run(tiny, tmp_path / "bdpo", bdpo_alpha=0, **given)
    assert reference.format(adapter=adapter) in _joined(capfd)
    theirs = run(tiny, tmp_path / "sigmoid", pref_loss="sigmoid", **given)
    assert (abs(curve(theirs, "rewards/chosen")[0]) < 1e-4) is new
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert curve(ours, name) == pytest.approx(curve(theirs, name), abs=1e-5), name


def test_weights_of_the_second_copy_are_let_go(tiny, tmp_path):
    """`run_dpo` holds a name for the model until the end."""
    from llamafactory.train.tuner import run_exp
    from llamafactory_runs import config
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            import gc

            seen.append({p.data_ptr() for p in _parameters(gc.get_objects()) if p.numel()})
            mine.append({p.data_ptr() for p in model.parameters()})

    seen, mine = [], []
    run_exp(config(tiny, tmp_path / "run", max_steps=1, **FULL), callbacks=[Count()])
    assert seen[0] & mine[0] == mine[0]
    assert len(seen[0] - mine[0]) < len(mine[0])


def _parameters(objects):
    return [o for o in objects if type(o) is torch.nn.Parameter]


def _joined(capfd) -> str:
    """The tables of the start, without the frames and breaks of their lines."""
    lines = [line.strip(" │") for line in capfd.readouterr().out.splitlines()]
    return " ".join(line.split("│")[-1].strip() for line in lines)


def test_a_shuffled_control_says_so(tiny, tmp_path, capfd):
    own = run(tiny, tmp_path / "bdpo", max_steps=1)
    control = run(tiny, tmp_path / "control", max_steps=1, bdpo_control="shuffled")
    assert "This is not B-DPO but its control" in " ".join(capfd.readouterr().out.split())
    ours, theirs = (
        list(zip(*(scores(of)[name] for name in ("weight_chosen", "scale")), strict=True))
        for of in (own, control)
    )
    assert sorted(ours) == sorted(theirs)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))
    assert curve(control, "bdpo/control") == [1.0]
    cards = [(of / "README.md").read_text(encoding="utf-8") for of in (own, control)]
    assert ["its control" in card for card in cards] == [False, True]
    for card in cards:
        assert "\n- bdpo\n" in card
        assert card.count("zhao2026bdpo") == 1
        assert "| training pairs | 32 |" in card
        assert "pref_loss: bdpo" in card
        assert str(tmp_path) not in card.partition("## B-DPO")[2]


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_first_process_of_all_completes_the_card(tmp_path, process):
    """With `save_on_each_node` that of each machine saves; the host writes one card."""
    from bdpo_plugin.hosts.llamafactory import hooks as activate

    (tmp_path / "README.md").write_text("---\ntags: []\n---\n\n# Theirs\n")
    training = SimpleNamespace(
        do_train=True, should_save=True, process_index=process, output_dir=str(tmp_path)
    )
    ours = SimpleNamespace(pref_loss="bdpo", bdpo_alpha=1.5, ref_model=None)
    given = ("moe_aux_loss_coef", "model_name_or_path", "adapter_name_or_path")
    model = SimpleNamespace(**dict.fromkeys(given))
    arguments = {"model_args": model, "training_args": training, "finetuning_args": ours}
    activate._run_dpo(lambda: None, arguments)
    assert ("## B-DPO" in (tmp_path / "README.md").read_text()) == (process == 0)
