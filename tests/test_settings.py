"""Every key: its default, what it takes, and what a refusal says."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo_plugin.limits import check_loss
from bdpo_plugin.settings import (
    LOSS_TYPES,
    PAIR_LOSSES,
    BDPOError,
    BDPOSettings,
    unknown_key_message,
)

DEFAULTS = {
    "bdpo_alpha": 1.5,
    "bdpo_weighting": "softmax",
    "bdpo_balance": True,
    "bdpo_scaling": True,
    "bdpo_mi_estimator": "pointwise",
    "bdpo_mi_normalize": True,
    "bdpo_null_prompt": None,
    "bdpo_precompute": True,
    "bdpo_score_tokens": None,
    "bdpo_cache_dir": None,
    "bdpo_control": None,
}
NUMBER = "a finite number >= 0 (0 is exactly DPO), at most 3.4e38"
BOOL = "true or false"
TEXT = "text that is more than white space, or left out"
UNICODE = "text in Unicode, without half a surrogate pair"
FOLDER = "a folder, or one that can be made"
WHOLE = "a whole number from 1 to 2147483647"


def test_keys_and_defaults() -> None:
    assert BDPOSettings().to_keys() == DEFAULTS
    assert BDPOSettings.keys() == tuple(DEFAULTS)


@pytest.mark.parametrize(
    ("key", "value", "held"),
    [
        ("bdpo_alpha", 0, 0.0),
        ("bdpo_alpha", 2, 2.0),
        ("bdpo_alpha", "1e-1", 0.1),  # YAML 1.1 reads it as a string
        ("bdpo_weighting", "power", "power"),
        ("bdpo_balance", False, False),
        ("bdpo_scaling", False, False),
        ("bdpo_mi_estimator", "expected", "expected"),
        ("bdpo_mi_normalize", False, False),
        ("bdpo_null_prompt", "USER: \nASSISTANT:", "USER: \nASSISTANT:"),
        ("bdpo_precompute", False, False),
        ("bdpo_score_tokens", 1, 1),
        ("bdpo_score_tokens", 1e4, 10000),
        ("bdpo_score_tokens", "4096", 4096),
        ("bdpo_cache_dir", "~/scores", "~/scores"),
        ("bdpo_cache_dir", Path("scores"), "scores"),
        ("bdpo_alpha", np.float32(0.5), 0.5),
        ("bdpo_alpha", np.int64(2), 2.0),
        ("bdpo_alpha", float(np.finfo(np.float32).max), float(np.finfo(np.float32).max)),
        ("bdpo_score_tokens", np.int32(64), 64),
        ("bdpo_score_tokens", 2**31 - 1, 2**31 - 1),
    ],
)
def test_takes(key, value, held) -> None:
    settings = BDPOSettings.from_keys({key: value})
    assert settings.to_keys() == DEFAULTS | {key: held}
    assert type(settings.to_keys()[key]) is type(held)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("bdpo_alpha", -0.1, NUMBER),
        ("bdpo_alpha", math.inf, NUMBER),
        ("bdpo_alpha", math.nan, NUMBER),
        ("bdpo_alpha", "nan", NUMBER),
        ("bdpo_alpha", "high", "a number"),
        ("bdpo_alpha", True, "a number"),
        ("bdpo_alpha", [1.0, 1.5], "a number"),
        ("bdpo_alpha", 10**400, "a number"),
        ("bdpo_alpha", 1e300, NUMBER),
        ("bdpo_alpha", 3.5e38, NUMBER),
        ("bdpo_alpha", np.float64("nan"), NUMBER),
        ("bdpo_alpha", 1j, "a number"),
        ("bdpo_alpha", np.True_, "a number"),
        ("bdpo_alpha", "", "a number"),
        ("bdpo_weighting", "linear", "'softmax' or 'power'"),
        ("bdpo_weighting", ["softmax"], "'softmax' or 'power'"),
        ("bdpo_mi_estimator", "kl", "'pointwise' or 'expected'"),
        ("bdpo_balance", "yes", BOOL),
        ("bdpo_scaling", 1, BOOL),
        ("bdpo_mi_normalize", 0, BOOL),
        ("bdpo_precompute", "false", BOOL),
        ("bdpo_null_prompt", "", TEXT),
        ("bdpo_null_prompt", 3, TEXT),
        ("bdpo_null_prompt", " \n\t", TEXT),
        ("bdpo_null_prompt", ["USER: "], TEXT),
        ("bdpo_null_prompt", "Q: \ud800", UNICODE),
        ("bdpo_cache_dir", "", TEXT),
        ("bdpo_cache_dir", " ", TEXT),
        ("bdpo_cache_dir", __file__, FOLDER),
        ("bdpo_cache_dir", f"{__file__}/scores", FOLDER),
        ("bdpo_cache_dir", "a\0b", FOLDER),
        ("bdpo_cache_dir", "a" * 5000, FOLDER),
        ("bdpo_cache_dir", "~no-such-user-here/scores", FOLDER),
        ("bdpo_cache_dir", False, TEXT),
        ("bdpo_score_tokens", 0, WHOLE),
        ("bdpo_score_tokens", -1, WHOLE),
        ("bdpo_score_tokens", 1.5, WHOLE),
        ("bdpo_score_tokens", math.inf, WHOLE),
        ("bdpo_score_tokens", math.nan, WHOLE),
        ("bdpo_score_tokens", 2**31, WHOLE),
        ("bdpo_score_tokens", 1e30, WHOLE),
        ("bdpo_score_tokens", np.float32(0.5), WHOLE),
        ("bdpo_score_tokens", "many", "a number"),
        ("bdpo_score_tokens", True, "a number"),
    ],
)
def test_refuses(key, value, allowed) -> None:
    with pytest.raises(BDPOError) as refusal:
        BDPOSettings.from_keys({key: value})
    assert str(refusal.value) == f"`{key}: {value!r}` cannot be used: it must be {allowed}."


def test_a_folder_that_may_not_be_looked_into_is_left_to_the_store(monkeypatch) -> None:
    def forbidden(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    assert BDPOSettings(cache_dir="/somebody/else").cache_dir == "/somebody/else"


def test_direct_construction_validates_too() -> None:
    with pytest.raises(BDPOError, match="`bdpo_alpha: -1` cannot be used"):
        BDPOSettings(alpha=-1)


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("bdpo_alhpa", "bdpo_alpha"),
        ("bdpo_weights", "bdpo_weighting"),
        ("bdpo_estimator", "bdpo_mi_estimator"),
        ("bdpo_normalise", "bdpo_mi_normalize"),
        ("bdpo_null", "bdpo_null_prompt"),
        ("bdpo_cache", "bdpo_cache_dir"),
        ("bdpo_scale", "bdpo_scaling"),
        ("bdpo_Balance", "bdpo_balance"),
        ("bdpo_precompute_ref", "bdpo_precompute"),
    ],
)
def test_unknown_key_names_the_nearest(typo, nearest) -> None:
    with pytest.raises(BDPOError) as refusal:
        BDPOSettings.from_keys({"bdpo_alpha": 1.0, typo: None})
    message = str(refusal.value)
    assert message == unknown_key_message(typo)
    assert message.startswith(f"Unknown key `{typo}`. Did you mean `{nearest}`?")
    assert all(key in message for key in DEFAULTS)


@pytest.mark.parametrize("key", ["bdpo_frobnicate", "bdpo_x", "bdpo_reference_model"])
def test_what_is_far_from_all_keys_is_not_taken_for_one(key) -> None:
    assert "Did you mean" not in unknown_key_message(key)
    assert "The keys of B-DPO are: bdpo_alpha" in unknown_key_message(key)
    told = unknown_key_message("frobnicate", ["learning_rate", "seed"])
    assert told == "Unknown key `frobnicate`. No known key is like it: remove it."


@given(st.sampled_from(tuple(DEFAULTS)), st.data())
def test_one_lost_letter_finds_its_key(key, data) -> None:
    at = data.draw(st.integers(len("bdpo_"), len(key) - 1))
    assert f"Did you mean `{key}`?" in unknown_key_message(key[:at] + key[at + 1 :])


def test_none_is_left_out_and_other_keys_are_not_ours() -> None:
    values = dict.fromkeys(DEFAULTS) | {"rl": "bdpo", "beta": "not ours", "dpo_alpha": -1}
    assert BDPOSettings.from_keys(values) == BDPOSettings()


@given(
    st.builds(
        BDPOSettings,
        alpha=st.floats(0, 1e6),
        weighting=st.sampled_from(["softmax", "power"]),
        balance=st.booleans(),
        scaling=st.booleans(),
        mi_estimator=st.sampled_from(["pointwise", "expected"]),
        mi_normalize=st.booleans(),
        null_prompt=st.none() | st.text(min_size=1).filter(str.strip),
        precompute=st.just(True),
        score_tokens=st.integers(1, 10**9),
        cache_dir=st.none() | st.from_regex(r"\A[a-z .]*[a-z]/?\Z"),
        control=st.sampled_from([None, "shuffled", "shuffled:label", "swapped", "random"]),
    )
    | st.builds(BDPOSettings, precompute=st.just(False), control=st.sampled_from([None, "swapped"]))
)
def test_keys_roundtrip(settings) -> None:
    assert BDPOSettings.from_keys(settings.to_keys()) == settings


def losses(types, smoothing=None):
    """Those of a host that calls its keys so."""
    return check_loss(types, smoothing, type_key="host_loss", smoothing_key="host_smoothing")


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_loss_types_taken(loss) -> None:
    assert losses(loss) == [loss]
    assert losses((loss, "sft")) == [loss, "sft"]


@pytest.mark.parametrize(
    "loss_types", ["kto_pair", ["sigmoid", "apo_zero"], ["aot", "sft"], 5, ["hinge", None]]
)
def test_unsupported_loss_names_the_key_the_loss_and_the_list(loss_types) -> None:
    names = loss_types if isinstance(loss_types, list) else [loss_types]
    culprit = next(n for n in names if n not in LOSS_TYPES)
    with pytest.raises(BDPOError) as refusal:
        losses(loss_types)
    message = str(refusal.value)
    assert message.startswith(f"`host_loss: {culprit}` is not supported by B-DPO")
    assert f"Supported: {', '.join(LOSS_TYPES)}" in message


@pytest.mark.parametrize("loss_types", ["sft", ["sft"], []])
def test_a_preference_loss_is_needed(loss_types) -> None:
    with pytest.raises(BDPOError, match="has no preference loss to balance") as refusal:
        losses(loss_types)
    assert str(refusal.value).startswith("`host_loss: ")
    assert str(refusal.value).endswith(f"Add one of: {', '.join(PAIR_LOSSES)}.")


@pytest.mark.parametrize("smoothing", [None, 0, 0.0, 0.499, "1e-1", np.float32(0.1)])
def test_label_smoothing_taken(smoothing) -> None:
    assert losses(["robust", "sigmoid"], smoothing) == ["robust", "sigmoid"]


@pytest.mark.parametrize("smoothing", [0.5, -0.1, 1, math.nan, math.inf, "many", True, [0.1]])
def test_label_smoothing_out_of_range(smoothing) -> None:
    with pytest.raises(BDPOError) as refusal:
        losses("robust", smoothing)
    message = str(refusal.value)
    assert message.startswith(
        f"`host_smoothing: {smoothing!r}` cannot be used: it must be a number"
    )


@pytest.mark.parametrize("smoothing", [0.1, -0.1, "0.1", math.nan])
def test_label_smoothing_that_no_loss_reads(smoothing) -> None:
    with pytest.raises(BDPOError, match="Add 'robust' to the losses, or remove it") as refusal:
        losses(["sigmoid", "sft"], smoothing)
    words = f"`host_smoothing: {smoothing}` has no effect on `host_loss: ['sigmoid', 'sft']`"
    assert str(refusal.value).startswith(words)
    assert losses(["sigmoid", "sft"], 0) == ["sigmoid", "sft"]


@pytest.mark.parametrize("precompute", [True, False])
def test_a_host_may_say_the_same_of_the_pass(precompute) -> None:
    settings = BDPOSettings(precompute=precompute)
    settings.check_precompute(None)
    settings.check_precompute(precompute)
    with pytest.raises(BDPOError) as refusal:
        settings.check_precompute(not precompute)
    words = (
        f"`precompute_ref_log_probs: {not precompute}` contradicts `bdpo_precompute: {precompute}`"
    )
    assert str(refusal.value).startswith(words)
