"""The recipes: what Axolotl's validation says of each, and a short run with little in its place."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.utils.dict import DictDefault
from axolotl_runs import server
from commandline import bdpo
from real_runs import make_tiny, run_command
from running import scores

from bdpo_plugin.recipes.recipe_file import read_recipe, recipe_files, recipe_root

FILES = {n: p for n, p in recipe_files(recipe_root()).items() if n.startswith("axolotl/")}
NAMES = [name.partition("/")[2] for name in FILES]
README = Path(__file__).parents[3] / "README.md"

#: The configuration that stands there, a QLoRA.
IN_README = "readme-qlora"

#: All that is changed of a recipe, beside the model, the data and where it writes: one step of two
#: pairs on a CPU, without flash-attention, and not shared among processes.
SMALL = {
    "max_steps": 1,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_set_size": 0.0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "deepspeed": None,
    "save_strategy": "no",
    "saves_per_epoch": None,
    "evals_per_epoch": None,
    "test_datasets": None,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
}
#: Of the same process, one after the other: what `axolotl train --launcher python` does.
SCRIPT = """
import sys
from axolotl.cli.train import do_cli

for config in sys.argv[1:]:
    do_cli(config)
"""


@pytest.mark.parametrize("name", FILES)
def test_check_finds_nothing_wrong(name) -> None:
    code, shown = bdpo("recipes", "check", name)
    assert code == 0, shown
    assert "nothing wrong" in shown


def small(config: dict, tiny: Path, folder: Path) -> dict:
    """A recipe with little in the place of what takes long."""
    (data,) = config["datasets"]
    places = {
        "base_model": str(tiny / "model"),
        "datasets": [{**data, "path": str(tiny / "train.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "run"),
        "bdpo_cache_dir": str(folder / "scores"),
    }
    changed = {**config, **places, **SMALL}
    if "bit" in config.get("optimizer", ""):  # has no kernel for CPUs
        changed["optimizer"] = "adamw_torch"
    return {key: value for key, value in changed.items() if value is not None}


PAIRS = [
    {
        "messages": [{"role": "user", "content": f"Question {i}?"}],
        "chosen": {"role": "assistant", "content": f"Good {i}."},
        "rejected": {"role": "assistant", "content": f"Bad {i}."},
        "label": "safe",
    }
    for i in range(60)
]
CHATML = "<|im_start|>user\nQuestion {}?<|im_end|>\n<|im_start|>assistant\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Question {}? ASSISTANT:"
)


@pytest.mark.parametrize(
    ("name", "prompt", "end"),
    [
        ("qwen2-7b-lora", CHATML, "<|im_end|>"),
        ("qwen2-7b-full", CHATML, "<|im_end|>"),
        ("qwen3-0.6b", CHATML + "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("vicuna-7b-qlora", VICUNA, "<|im_end|>"),  # the tiny tokenizer's end of a text
    ],
)
def test_loads_its_data(name, prompt, end, tiny, tmp_path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    config = read_recipe(FILES[f"axolotl/{name}"], name).config
    assert config["datasets"][0]["path"] == "./data/pku-saferlhf.jsonl"
    config["datasets"][0]["path"] = str(tmp_path / "pairs.jsonl")
    config |= {
        "base_model": tiny["base_model"],
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "dataset_num_proc": 1,
        "attn_implementation": "sdpa",
        "deepspeed": None,
    }
    cfg = load_cfg(DictDefault(config))
    assert cfg.bdpo is True
    data = load_preference_datasets(cfg=cfg)
    assert len(data.train_dataset) + len(data.eval_dataset) == 60
    row = data.train_dataset[0]
    number = row["prompt"].split("Question ")[1].split("?")[0]
    assert row["prompt"] == prompt.format(number)
    assert (row["chosen"], row["rejected"]) == (f"Good {number}.{end}", f"Bad {number}.{end}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run of each recipe, all in one process."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny = make_tiny(folder / "tiny")
    pairs = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    (tiny / "train.jsonl").write_text("".join(pairs[:8]))
    files = []
    configs = {n: read_recipe(p, n).config for n, p in zip(NAMES, FILES.values(), strict=True)}
    configs[IN_README] = yaml.safe_load(README.read_text().split("```yaml\n")[1].split("```")[0])
    for name, config in configs.items():
        (folder / name).mkdir()
        config = small(config, tiny, folder / name)
        files.append(folder / name / "recipe.yml")
        files[-1].write_text(yaml.safe_dump(config | {"bdpo_recipe": {"title": name}}))
    run_command(["python", "-c", SCRIPT, *map(str, files)], {}, server())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, IN_README])
def test_runs(name, runs) -> None:
    folder = runs / name / "run"
    record = json.loads((folder / "bdpo" / "run.json").read_text())
    assert record["pairs"] == len(scores(folder)["row"]) == 8
    adapter = (folder / "adapter_config.json").is_file()
    assert adapter == (not name.endswith("-full"))
    assert record["quantised"] == name.endswith("-qlora")
    assert record["settings"]["bdpo_alpha"] == 1.5
    written = yaml.safe_load((folder / "bdpo" / "recipe.yml").read_text())
    assert written["bdpo_recipe"] == {"title": name}
