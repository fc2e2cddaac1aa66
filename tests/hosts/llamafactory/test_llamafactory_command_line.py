"""`llamafactory-cli train`, from the YAML to the finished adapter."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("llamafactory")

from cases import first
from llamafactory_runs import cli, config, curve, log, scores, train
from real_runs import weights
from torch.testing import assert_close

pytestmark = pytest.mark.slow

#: What a run logs of time and memory, and not of training.
TIMES = re.compile("runtime|per_second|peak_memory")

#: The keys of LLaMA-Factory's examples/deepspeed/ds_z2_config.json that matter here.
ZERO_2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def without_times(entries):
    return [{k: v for k, v in entry.items() if not TIMES.search(k)} for entry in entries]


def test_alpha_0_is_sigmoid_over_20_steps(tiny, tmp_path):
    """With an epsilon above the rounding of the gradients: of a smaller one, which differs between
    a padded and a packed batch, Adam makes steps of up to the learning rate."""
    for name, keys in {
        "sigmoid": {"pref_loss": "sigmoid"},
        "bdpo": {"bdpo_alpha": 0},
    }.items():
        train(tiny, tmp_path / name, max_steps=20, adam_epsilon=1e-5, **keys)
    ours, theirs = tmp_path / "bdpo", tmp_path / "sigmoid"
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        expected = curve(theirs, name)
        assert len(expected) == 20
        tolerance = 1e-3 if name.startswith("logps") else 1e-5  # nats of a whole response
        assert curve(ours, name) == pytest.approx(expected, abs=tolerance), name
    assert curve(ours, "loss")[-1] < 0.6
    trained = weights(theirs)
    assert trained
    for name, tensor in weights(ours).items():
        assert_close(tensor, trained[name], rtol=0, atol=1e-5)


def test_another_loss_is_untouched(tiny, tmp_path):
    """Without the entry point PyTorch does not know us, as if we were not installed. Both are
    cold."""
    places = {"with": {}, "without": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}}
    shown = {}
    for name, environment in places.items():
        shown[name] = train(
            tiny, tmp_path / name, pref_loss="sigmoid", cold=True, environment=environment
        )
    assert "B-DPO" not in shown["with"]
    logs = [without_times(log(tmp_path / name)) for name in places]
    assert logs[0] == logs[1]
    one, other = (weights(tmp_path / name) for name in places)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_arguments_of_the_command_line(tiny, tmp_path):
    keys = config(tiny, tmp_path / "run", plot_loss=True, bdpo_alpha="5e-1", bdpo_scaling=False)
    out = cli("train", *(part for key, value in keys.items() for part in (f"--{key}", value)))
    assert re.search(r"weights .*softmax, alpha 0.5, scaling factor off", out)
    assert re.search(r"reference .*base model .*model, adapter off", out)
    assert "32: 32 scored now, 0 reused" in out
    saved = scores(tmp_path / "run")
    assert len(saved["row"]) == 32
    assert set(saved["scale"]) == {1.0}
    assert len(curve(tmp_path / "run", "bdpo/imbalance")) == 3
    pictures = {path.name for path in (tmp_path / "run").glob("training_*.png")}
    assert {"training_loss.png", "training_bdpo_weight_chosen.png"} <= pictures


@pytest.mark.parametrize("engine", first(1, ["ddp", "deepspeed"]))  # the latter compiles
def test_two_processes(tiny, tmp_path, engine):
    """The same scores, and the same training as one process with twice the batch."""
    two, options = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}, {}
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
        options["deepspeed"] = str(tmp_path / "zero-2.json")
        Path(options["deepspeed"]).write_text(json.dumps(ZERO_2))
        two["DS_ACCELERATOR"] = "cpu"
    evaluation = {"eval_dataset": "eval", "eval_strategy": "steps", "eval_steps": 3}
    out = train(
        tiny,
        tmp_path / "two",
        per_device_train_batch_size=2,
        bdpo_cache_dir=str(tmp_path / "scores of two"),
        environment=two,
        **evaluation,
        **options,
    )
    assert out.count("32: 32 scored now, 0 reused") == 1
    assert ("After initializing ZeRO optimizer" in out) == (engine == "deepspeed")
    train(tiny, tmp_path / "one", bdpo_cache_dir=str(tmp_path / "scores of one"), **evaluation)
    together, alone = scores(tmp_path / "two"), scores(tmp_path / "one")
    for name, column in alone.items():
        assert together[name] == pytest.approx(column, abs=1e-5, rel=1e-5), name
    for name in ("bdpo/imbalance", "rewards/margins", "eval_bdpo/imbalance", "eval_loss"):
        found = curve(tmp_path / "two", name)
        assert found == pytest.approx(curve(tmp_path / "one", name), abs=1e-4), name
