"""The model with its adapter off is the reference: an adapter that changes the base model for good
is refused before its scores would be wrong."""

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from running import pairs, scores, sharp_model, trainer
from trl.models import prepare_deepspeed

from bdpo_plugin import BDPOError
from bdpo_plugin.reference.reference_source import (
    ReferenceSource,
    _check_initialisation,
    _trained_base,
)

LINEAR = ["q_proj", "v_proj"]
CHANGING = {
    "all": lambda: LoraConfig(r=4, target_modules=LINEAR, bias="all"),
    "lora_only": lambda: LoraConfig(r=4, target_modules=LINEAR, bias="lora_only"),
    "boft_only": lambda: BOFTConfig(target_modules=LINEAR, boft_block_size=4, bias="boft_only"),
}
STEPWISE = {"bdpo_precompute": False}


@pytest.mark.parametrize("bias", CHANGING)
def test_trained_biases_are_refused_where_each_step_is_scored(tmp_path, bias) -> None:
    with pytest.raises(
        BDPOError, match=rf"`bias: {bias}` changes weights.*`bdpo_precompute: true`"
    ):
        trainer(output_dir=tmp_path, lora=CHANGING[bias](), **STEPWISE)


def test_so_are_weights_that_the_user_trains_beside_the_adapter(tmp_path) -> None:
    made = trainer(output_dir=tmp_path, **STEPWISE)
    made.model.get_input_embeddings().weight.requires_grad_(True)
    source = ReferenceSource(made, prepare_deepspeed)
    with pytest.raises(BDPOError, match=r"training base_model\..*embed_tokens.weight changes"):
        source.during_step(made.model)


def test_before_training_they_are_the_base_model(tmp_path) -> None:
    made = trainer(output_dir=tmp_path / "all", lora=CHANGING["all"](), max_steps=1)
    trainer(output_dir=tmp_path / "base")
    assert scores(tmp_path / "all") == scores(tmp_path / "base")
    assert made.evaluate(pairs(4, seed=1))["eval_bdpo/scale"] > 0
    made.train()
    with pytest.raises(BDPOError, match="`bias: all` changes weights"):
        made.evaluate(pairs(4, seed=2))


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_taken_out_of_the_base_model_is_refused(tmp_path, how) -> None:
    lora = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=how)
    with pytest.raises(BDPOError, match=f"`init_lora_weights: {how}` cannot be used with B-DPO"):
        trainer(output_dir=tmp_path, lora=lora)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraConfig(r=4, target_modules=LINEAR, lora_bias=True),
        lambda: LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
        lambda: LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "norm"]),
        lambda: LoraConfig(
            r=4, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [7, 8]}
        ),
        lambda: LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="orthogonal"),
        lambda: IA3Config(target_modules=LINEAR, feedforward_modules=[]),
        lambda: VeraConfig(r=4, target_modules=LINEAR),
        lambda: LNTuningConfig(target_modules=["norm"]),
        lambda: TrainableTokensConfig(token_indices=[7, 8]),
        lambda: BOFTConfig(target_modules=LINEAR, boft_block_size=4),
        lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=range(11),
)
def test_others_leave_it_as_it_is(make) -> None:
    """What is not refused, moved as by training, leaves the base model's logits to the last bit."""
    ids = torch.arange(5, 25)[None]
    base = sharp_model()
    with torch.no_grad():
        wanted = base(ids).logits
        adapted = get_peft_model(base, make()).eval()
        _check_initialisation(adapted)
        assert _trained_base(adapted) == []
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, wanted)
