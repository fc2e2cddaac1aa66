"""What LLaMA-Factory's arguments become, and what is refused before a model is loaded."""

import dataclasses
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("llamafactory")

from llamafactory.hparams import FinetuningArguments, get_train_args
from llamafactory.hparams.parser import read_args
from llamafactory.train.dpo import trainer as dpo_trainer
from llamafactory_runs import config, run, train
from transformers import T5Config
from trl import DPOTrainer

from bdpo_plugin.settings import BDPOError, BDPOSettings


@pytest.fixture
def arguments(tmp_path):
    """LLaMA-Factory's fine-tuning arguments of a run; its model does not exist."""

    def make(**changes):
        keys = config(tmp_path, tmp_path / "run", **changes)
        return get_train_args(read_args(keys))[3]

    return make


@pytest.fixture(scope="session")
def original():
    """`FinetuningArguments` as LLaMA-Factory wrote it."""
    return FinetuningArguments.__mro__[1]


def test_keys_reach_the_settings(arguments):
    args = arguments(bdpo_alpha=0.5, bdpo_balance=False, bdpo_null_prompt="hello")
    found = BDPOSettings.from_keys(vars(args))
    assert found == BDPOSettings(alpha=0.5, balance=False, null_prompt="hello")
    assert args.use_ref_model
    assert args.to_dict()["bdpo_alpha"] == 0.5


@pytest.mark.parametrize("pref_loss", ["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"])
def test_other_losses_have_the_arguments_of_llama_factory(arguments, original, pref_loss):
    ours = arguments(pref_loss=pref_loss)
    assert isinstance(ours, original)
    theirs = original(stage="dpo", pref_loss=pref_loss, lora_rank=4, lora_target="all")
    assert ours.to_dict() == theirs.to_dict()
    assert ours.use_ref_model == theirs.use_ref_model


@pytest.mark.parametrize(
    "recipe",
    sorted((Path(__file__).parents[3] / "example_configs" / "llamafactory").glob("*.yml")),
    ids=lambda path: path.stem,
)
def test_recipe_is_accepted(recipe, tmp_path):
    keys = yaml.safe_load(recipe.read_text())
    here = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "deepspeed": None}
    args = get_train_args(read_args(keys | here))[3]
    assert args.pref_loss == "bdpo"
    assert args.bdpo_alpha == 1.5


def test_trainer_is_still_a_class():
    assert issubclass(dpo_trainer.CustomDPOTrainer, DPOTrainer)

    class Mine(dpo_trainer.CustomDPOTrainer):
        pass

    assert issubclass(Mine, dpo_trainer.CustomDPOTrainer)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bdpo_alpha": -1}, "`bdpo_alpha: -1` cannot be used: it must be a finite number"),
        ({"bdpo_weighting": "hard"}, "`bdpo_weighting: 'hard'` cannot be used"),
        ({"bdpo_alhpa": 1}, "Unknown key `bdpo_alhpa`. Did you mean `bdpo_alpha`?"),
        ({"pref_loss": "sigmoid", "bdpo_alpha": 1}, "`bdpo_alpha` has no effect with `pref_loss"),
        ({"pref_loss": None, "bdpo_scaling": False}, "has no effect with `pref_loss: sigmoid`"),
        ({"pref_loss": "BDPO"}, "`pref_loss: BDPO`. Did you mean `pref_loss: bdpo`?"),
        ({"pref_loss": "b-dpo"}, "Did you mean `pref_loss: bdpo`?"),
        ({"pref_loss": "bpdo"}, "Did you mean `pref_loss: bdpo`?"),
        ({"pref_loss": "balanced_dpo"}, "Did you mean `pref_loss: bdpo`?"),
        ({"stage": "sft"}, "`pref_loss: bdpo` needs `stage: dpo`, not `stage: sft`"),
        ({"stage": "kto"}, "needs `stage: dpo`, not `stage: kto`"),
        ({"pref_bco_weight": 0.5}, "`pref_bco_weight: 0.5` cannot be used with `pref_loss: bdpo`"),
        ({"dpo_label_smoothing": 0.1}, "`dpo_label_smoothing: 0.1` cannot be used"),
        ({"ld_alpha": 0.5}, "`ld_alpha: 0.5` cannot be used with `pref_loss: bdpo`"),
        ({"ld_alpha": 0.0}, "`ld_alpha: 0.0` cannot be used with `pref_loss: bdpo`"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_refused(arguments, keys, words):
    with pytest.raises(BDPOError) as refusal:
        arguments(**keys)
    assert words in str(refusal.value)


def test_unknown_option_of_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", "--pref_loss=bdpo", "--bdpo-alhpa", "1"])
    with pytest.raises(BDPOError, match="Did you mean `bdpo_alpha`"):
        read_args()


def test_packing_is_refused_by_llama_factory(arguments):
    with pytest.raises(ValueError, match="neat_packing"):
        arguments(neat_packing=True)


def test_megatron_is_refused(monkeypatch):
    FinetuningArguments(stage="dpo", pref_loss="bdpo")
    monkeypatch.setenv("USE_MCA", "1")
    FinetuningArguments(stage="dpo", pref_loss="sigmoid")
    with pytest.raises(BDPOError, match="Megatron"):
        FinetuningArguments(stage="dpo", pref_loss="bdpo")


def printed(source):
    """The lines that a new process of this source prints."""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


#: Of a process for which no release of LLaMA-Factory has been tested.
UNTESTED = """
import bdpo_plugin.hosts.llamafactory.arguments as ours
ours.TESTED = ("0.0.1",)
from llamafactory.hparams import FinetuningArguments, parser
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.webui.components.train import create_train_tab
for name in (parser.read_args, CustomDPOTrainer, create_train_tab):
    print("wrapped", hasattr(name, "__wrapped__"))
print(FinetuningArguments(stage="dpo", pref_loss="sigmoid").pref_loss)
try:
    FinetuningArguments(stage="dpo", pref_loss="bdpo")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_another_release_is_refused_and_nothing_else_is_in_force():
    *wrapped, other, refusal = printed(UNTESTED)[-5:]
    assert wrapped == ["wrapped False"] * 3
    assert other == "sigmoid"
    found = importlib.metadata.version("llamafactory")
    assert f"has not been tested with llamafactory {found}" in refusal
    assert "Install one of: 0.0.1" in refusal


#: Of a process in which something of ours is missing.
INCOMPLETE = """
{missing}
from llamafactory.hparams import FinetuningArguments
print(FinetuningArguments(stage="dpo", pref_loss="sigmoid").pref_loss)
try:
    FinetuningArguments(stage="dpo", pref_loss="bdpo")
except ValueError as error:
    print(error)
"""
NO_TRAINER = """
from bdpo_plugin import autoload
autoload.HOOKS.pop("llamafactory.train.dpo.trainer")
"""
NO_MODULE = """
import sys
sys.modules["bdpo_plugin.hosts.llamafactory.arguments"] = None
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (NO_TRAINER, "its trainer is not active"),
        (NO_MODULE, "could not hook into LLaMA-Factory"),
    ],
    ids=["trainer", "module"],
)
def test_never_comes_to_another_trainer(missing, words):
    other, refusal = printed(INCOMPLETE.format(missing=missing))[-2:]
    assert other == "sigmoid"
    assert words in refusal


@pytest.mark.slow
def test_without_us_llama_factory_stops_at_our_keys(tiny, tmp_path):
    with pytest.raises(AssertionError, match="bdpo_alpha"):
        train(tiny, tmp_path / "run", bdpo_alpha=1, environment={"BDPO_AUTOLOAD": "0"})


@pytest.mark.slow
def test_llama_board_offers_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it keeps its cache
    from llamafactory.webui.interface import create_ui

    choices = [
        [value for _, value in block.choices]
        for block in create_ui().blocks.values()
        if type(block).__name__ == "Dropdown" and ("simpo", "simpo") in block.choices
    ]
    assert [names[-1] for names in choices] == ["bdpo"]


@pytest.mark.parametrize("model", ["no/such/model", "./not-here", "nowhere"])
def test_a_model_that_is_not_there_is_told_by_its_key(tmp_path, model):
    with pytest.raises(BDPOError, match=rf"`model_name_or_path: {model}` cannot be loaded: there"):
        run(tmp_path, tmp_path / "run", model_name_or_path=model)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ref_model": "gone/away/x"}, "`ref_model: gone/away/x` cannot be loaded"),
        ({"adapter_name_or_path": "an/adapter/x"}, "`adapter_name_or_path: an/adapter/x` cannot"),
        ({"moe_aux_loss_coef": 0.01}, "`moe_aux_loss_coef: 0.01` has no effect"),
        ({"bdpo_control": "shuffled:subset"}, "`bdpo_control: shuffled:subset` cannot be used in"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_ends_a_run_later_is_told_at_once(tiny, tmp_path, keys, words):
    with pytest.raises(BDPOError) as refusal:
        run(tiny, tmp_path / "run", **keys)
    assert words in str(refusal.value)


def test_an_encoder_decoder_model_is_refused(tmp_path):
    T5Config(d_model=8).save_pretrained(tmp_path / "model")
    with pytest.raises(BDPOError, match=r"is an encoder-decoder model \(`model_type: t5`\)"):
        run(tmp_path, tmp_path / "run")


def test_what_says_the_defaults_is_never_refused(arguments, original):
    """Each argument with LLaMA-Factory's default, and with the value that changes nothing."""
    spelt_out = {
        field.name: field.default
        for field in dataclasses.fields(original)
        if field.init and field.default not in (None, dataclasses.MISSING)
    }
    own = {"stage", "pref_loss", "lora_rank", "lora_target", "finetuning_type"}
    neutral = {"ld_alpha": 1.0, "pref_bco_weight": 0, "dpo_label_smoothing": 0, "pref_ftx": 0}
    args = arguments(**{k: v for k, v in spelt_out.items() if k not in own} | neutral)
    assert (args.pref_loss, args.ld_alpha) == ("bdpo", 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ('{"messages": []}\n{"messages": [\n', "line 2 is no JSON"),
        ('[{"messages": []},\n {"messages": ]\n', "line 2 is no JSON"),
        ("[]", "it has no rows"),
        (None, "is not there: correct `file_name`"),
    ],
    ids=["empty", "line", "document", "no rows", "missing"],
)
def test_a_file_that_cannot_be_read_is_told(tiny, tmp_path, text, words):
    (tmp_path / "dataset_info.json").write_text((tiny / "dataset_info.json").read_text())
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(BDPOError) as refusal:
        run(tiny, tmp_path / "run", dataset_dir=str(tmp_path))
    assert words in str(refusal.value)
    assert "train.jsonl" in str(refusal.value)
