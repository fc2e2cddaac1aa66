"""Which releases of TRL and which launches are refused, beside what test_trainer.py has."""

import warnings
from types import SimpleNamespace

import pytest
import trl
from trl import DPOTrainer

from bdpo_plugin.hosts.trl import limits as checks
from bdpo_plugin.settings import BDPOError


def released(name, method):
    """TRL's trainer as of a release that has another method of this name."""
    return type("DPOTrainer", (DPOTrainer,), {name: method})


def test_the_release_installed_is_a_tested_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_release(DPOTrainer, trl.__version__)


def test_an_untested_release_that_has_the_hooks_is_a_warning():
    with pytest.warns(UserWarning, match=r"tested with TRL .*1\.16\.0; this is 99\.0\."):
        checks.check_release(DPOTrainer, "99.0")
    with pytest.warns(UserWarning, match="this is 99.0"):
        checks.check_release(released("another_method", print), "99.0")


@pytest.mark.parametrize("name", checks._METHODS)
def test_a_release_without_a_hook_is_refused(name, monkeypatch):
    for cls in DPOTrainer.__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(BDPOError) as refusal:
        checks.check_release(DPOTrainer, "99.0")
    message = str(refusal.value)
    assert message.startswith("B-DPO cannot run beside TRL 99.0, whose DPOTrainer lacks the method")
    assert f" {name}({', '.join(checks._METHODS[name])})" in message
    assert message.endswith("Install one of the tested releases: 1.9.0, 1.16.0.")


@pytest.mark.parametrize(
    ("method", "lacks"),
    [
        (lambda self, dataset, name, batch_size: None, False),
        (lambda self, dataset, name, batch_size, column=None, **more: None, False),
        (lambda self, dataset, name: None, True),
        (lambda self, name, dataset, batch_size: None, True),
        (lambda self, dataset, name, batch_size, column: None, True),
        (None, True),
    ],
)
def test_a_hook_of_another_signature_counts_as_none(method, lacks):
    trainer = released("_precompute_ref_logps", method)
    if lacks:
        with pytest.raises(BDPOError, match=r"lacks the method _precompute_ref_logps\(dataset, "):
            checks.check_release(trainer, trl.__version__)
    else:
        checks.check_release(trainer, trl.__version__)


def test_all_that_is_missing_is_named():
    with pytest.raises(BDPOError) as refusal:
        checks.check_release(object, "0.1")
    assert all(name in str(refusal.value) for name in checks._METHODS)


def test_the_trainer_asks(tmp_path, monkeypatch):
    from running import trainer

    monkeypatch.setitem(checks._METHODS, "_prepare_dataset", ("dataset", "tokenizer"))
    with pytest.raises(BDPOError, match=r"lacks the method _prepare_dataset\(dataset, tokenizer\)"):
        trainer(output_dir=tmp_path)


def test_several_gpus_in_one_process_are_refused():
    checks.check_launch(SimpleNamespace(), 1)
    with pytest.raises(BDPOError, match="One process has 2 GPUs"):
        checks.check_launch(SimpleNamespace(), 2)


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_sequences_and_layers_split_over_ranks_are_refused(name):
    sizes = SimpleNamespace(tp_size=1, cp_size=1, dp_replicate_size=2)
    checks.check_launch(SimpleNamespace(parallelism_config=None), 1)
    checks.check_launch(SimpleNamespace(parallelism_config=sizes), 1)
    setattr(sizes, name, 2)
    with pytest.raises(BDPOError, match=f"`{name}: 2` cannot be used with B-DPO: .* Set it to 1"):
        checks.check_launch(SimpleNamespace(parallelism_config=sizes), 1)
