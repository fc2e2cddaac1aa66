"""What an Axolotl configuration may not ask of B-DPO: each is said before the model is loaded."""

import logging

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg

from bdpo_plugin.hosts.axolotl import limits
from bdpo_plugin.hosts.axolotl import rewrite_config as resolving
from bdpo_plugin.hosts.axolotl.plugin import BDPOPlugin
from bdpo_plugin.settings import BDPOError

REFUSED = {
    # keys of the method
    "unknown key": ({"bdpo_alhpa": 1.0}, ["`bdpo_alhpa`", "Did you mean `bdpo_alpha`?"]),
    "negative": ({"bdpo_alpha": -1}, ["`bdpo_alpha: -1`", "a finite number >= 0"]),
    "not a number": ({"bdpo_alpha": "much"}, ["`bdpo_alpha: 'much'`", "a number"]),
    "weighting": ({"bdpo_weighting": "hard"}, ["`bdpo_weighting: 'hard'`", "'softmax' or 'power'"]),
    "switch": ({"bdpo_balance": "maybe"}, ["`bdpo_balance: 'maybe'`", "true or false"]),
    "budget": ({"bdpo_score_tokens": 0}, ["`bdpo_score_tokens: 0`", "a whole number from 1"]),
    # keys without the method
    "plain DPO": (
        {"rl": "dpo", "bdpo_alpha": 1.0, "bdpo_scaling": False},
        [
            "`bdpo_alpha` has no effect with `rl: dpo`",
            "Write `rl: bdpo`, or remove",
            "bdpo_scaling",
        ],
    ),
    "no rl": ({"rl": None, "bdpo_alpha": 1.0}, ["`bdpo_alpha` has no effect with `rl: None`"]),
    "the mark by hand": ({"rl": "dpo", "bdpo": True}, ["`bdpo: true` says B-DPO", "`rl: bdpo`"]),
    # losses
    "loss": ({"dpo_loss_type": ["exo_pair"]}, ["`dpo_loss_type: exo_pair`", "sigmoid, hinge, ipo"]),
    "sft alone": ({"dpo_loss_type": ["sft"]}, ["no preference loss to balance"]),
    "smoothing": (
        {"dpo_label_smoothing": 0.1},
        ["`dpo_label_smoothing: 0.1` has no effect on `dpo_loss_type: ['sigmoid']`", "'robust'"],
    ),
    "smoothing too large": (
        {"dpo_label_smoothing": 0.5, "dpo_loss_type": ["robust"]},
        ["`dpo_label_smoothing: 0.5` cannot be used: it must be a number in [0, 0.5)"],
    ),
    # options of the host
    "weighting of WPO": ({"dpo_use_weighting": True}, ["`dpo_use_weighting: True`", "Remove it"]),
    "liger": ({"dpo_use_liger_kernel": True}, ["`dpo_use_liger_kernel: True`", "balance weights"]),
    "padding free": ({"dpo_padding_free": True}, ["`dpo_padding_free: True`", "one row"]),
    "processor": ({"processor_type": "AutoProcessor"}, ["`processor_type: AutoProcessor`", "text"]),
    "images": ({"image_size": 512}, ["`image_size: 512`", "no mutual information for images"]),
    "collator": ({"pad_to_multiple_of": 8}, ["`pad_to_multiple_of: 8`", "collator"]),
    "split sequences": (
        {"context_parallel_size": 2},
        ["`context_parallel_size: 2`", "Set it to 1"],
    ),
    "their old name": ({"sequence_parallel_degree": 2}, ["`sequence_parallel_degree: 2`"]),
    "split tensors": ({"tensor_parallel_size": 2}, ["`tensor_parallel_size: 2`", "Set it to 1"]),
    # options that Axolotl's DPO drops
    "values for the template": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        ["`chat_template_kwargs: {'enable_thinking': False}` has no effect", "{% set enable_"],
    ),
    "a system message": (
        {"default_system_message": "Be brief."},
        ["`default_system_message: Be brief.` has no effect", "a message of the role `system`"],
    ),
    "a key of an entry": (
        {"datasets": [{"path": "x", "type": "chat_template.default", "feild_chosen": "good"}]},
        ["`datasets[0].feild_chosen` has no effect", "Did you mean `field_chosen`?"],
    ),
    "pretraining data": (
        {"pretraining_dataset": [{"path": "./text"}]},
        ["`pretraining_dataset: ", "Name preference data in `datasets`"],
    ),
    "streaming": ({"streaming": True}, ["`streaming: True` has no effect", "loaded whole"]),
    "loss on the prompt": ({"train_on_inputs": True}, ["`train_on_inputs: True` has no effect"]),
    "another trainer": (
        {"trainer_cls": "my.Trainer"},
        ["`trainer_cls: my.Trainer`", "Remove one of the two"],
    ),
    "moving reference": (
        {"trl": {"sync_ref_model": True}},
        ["`trl.sync_ref_model: True`", "frozen reference"],
    ),
    "precompute, twice": (
        {"precompute_ref_log_probs": True, "bdpo_precompute": False},
        ["`precompute_ref_log_probs: True` contradicts `bdpo_precompute: False`"],
    ),
    "FSDP": (
        {"adapter": "lora", "fsdp_config": {"fsdp_version": 2}},
        ["Under FSDP", "`bdpo_precompute: false`"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, config) -> None:
    keys, said = REFUSED[case]
    with pytest.raises(BDPOError) as refusal:
        load_cfg(config(**keys))
    for part in said:
        assert part in str(refusal.value)


def test_no_key_is_refused_for_a_value_that_switches_it_off(config) -> None:
    known = {limit.key: limit for limit in limits.LIMITS if "." not in limit.key}
    for turn in range(7):  # each of the values that a key may have
        values = {
            key: (None, *limit.honoured)[turn % (1 + len(limit.honoured))]
            for key, limit in known.items()
        }
        resolving.resolve(
            config(
                **values,
                bdpo_alpha=None,
                trl={"sync_ref_model": False},
                dpo_label_smoothing=0.0,
                precompute_ref_log_probs=True,
            )
        )


def test_a_given_adapter_is_for_other_commands(config) -> None:
    """`axolotl merge-lora` and `evaluate` name it in the same configuration, which has then to come
    through; a training is stopped before it loads the model."""
    cfg = config(adapter="lora", lora_model_dir="./adapter")
    assert resolving.resolve(cfg)
    plugin = BDPOPlugin()
    with pytest.raises(BDPOError) as refusal:
        plugin.pre_model_load(cfg)
    for part in ("`lora_model_dir: ./adapter` has no effect", "neither the policy", "merge-lora"):
        assert part in str(refusal.value)
    cfg["merge_lora"] = True
    plugin.pre_model_load(cfg)


def test_precomputation_left_to_us(config) -> None:
    """Axolotl's false, its default, says no more than that TRL does not do it."""
    for precompute in (False, None):
        assert resolving.resolve(config(precompute_ref_log_probs=precompute))


def test_untested_release_is_a_warning(config, caplog, monkeypatch) -> None:
    monkeypatch.setattr(resolving, "version", lambda name: f"99.0 of {name}")
    logger = logging.getLogger("axolotl.bdpo")
    logger.addHandler(caplog.handler)
    try:
        assert resolving.resolve(config())
    finally:
        logger.removeHandler(caplog.handler)
    (warning,) = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
    assert "not been tested with axolotl 99.0 of axolotl; tested: 0.19.0" in warning


def test_tested_release_is_the_one_installed() -> None:
    assert resolving.version("axolotl") in resolving.TESTED
