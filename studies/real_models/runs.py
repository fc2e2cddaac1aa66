"""One run: its Axolotl configuration, its processes, and what they leave behind.

Each step is a process of its own and ends with a file written last, named by what it depends on:
a step whose file is there is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bdpo_plugin.settings import PREFIX, BDPOError
from bdpo_plugin.sources import pku_saferlhf
from bdpo_plugin.sources.selection import digest, select, write, write_whole
from studies.real_models.check import check

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METHODS = ("dpo", "bdpo", "shuffled")
#: Keys of Axolotl that this command sets itself.
OURS = (
    *(
        "base_model",
        "rl",
        "plugins",
        "trainer_cls",
        "adapter",
        "seed",
        "output_dir",
        "save_strategy",
    ),
    *("datasets", "dataset_prepared_path", "bdpo_cache_dir", "bdpo_precompute", "bdpo_control"),
)
_HOOKS = "studies.real_models.hooks.Hooks"
#: Keys of the recipes that ask for evaluation during training, or for checkpoints.
_NOT_NEEDED = ("val_set_size", "evals_per_epoch", "saves_per_epoch", "bdpo_recipe", "deepspeed")


class StepError(Exception):
    """A step that failed; the message names its log."""


def prepare(data: str, count: int, folder: Path) -> tuple[Path, dict[str, int]]:
    """Write the pairs that all runs share, half of each label, as JSONL named by its content.

    The choice does not depend on the seed of a run.

    Raises:
        BDPOError: no pair can be made of `data`.
    """
    sizes = {"unsafe": count // 2, "safe": count // 2}
    pairs, counts = select(pku_saferlhf.sort(pku_saferlhf.load_rows(data)), sizes)
    if not pairs:
        raise BDPOError(f"{data} gives no pair to train on: {counts}")
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    file = folder / f"pairs-{digest(text)}.jsonl"
    write(pairs, file, counts=counts, source={"name": "pku-saferlhf", "data": data})
    return file, counts


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of one command share.

    Attributes:
        model: name, or absolute path, of the model.
        adapter: ``qlora``, ``lora`` or ``full``: the recipe of example_configs/axolotl.
        pairs: the training data, see :func:`prepare`.
        keys: keys of Axolotl in the place of the recipe's.
        output: everything is kept in it.
        tasks: of lm-eval; none where empty.
        include: a folder with further tasks.
        limit: documents of each task; None for all.
        prompts: files of prompts.
        batch: rows answered, or scored by lm-eval, at a time.
        tokens: the most of an answer.
        launcher: of `axolotl train`.
    """

    model: str
    adapter: str
    pairs: Path
    keys: dict[str, Any]
    output: Path
    tasks: tuple[str, ...]
    include: Path | None
    limit: int | None
    prompts: tuple[Path, ...]
    batch: int
    tokens: int
    launcher: str


@dataclass(frozen=True)
class Run:
    """The model before training (method ``untrained``, seed None), or after one training."""

    setting: Setting
    method: str
    seed: int | None = None

    @property
    def name(self) -> str:
        return self.method if self.seed is None else f"{self.method} {self.seed}"

    @property
    def folder(self) -> Path:
        parts: list[Any] = [self.setting.model, self.method]
        if self.seed is not None:
            versions = [version(name) for name in ("bdpo-plugin", "axolotl")]
            sources = [_digest_of([HERE / "hooks.py"]), *versions]
            parts += [self.config(Path()), sources]
        return self.setting.output / "runs" / f"{self.name.replace(' ', '-')}-{_digest(parts)}"

    def config(self, output: Path) -> dict[str, Any]:
        """The Axolotl configuration: the recipe, `keys` in its place, and the method.

        Args:
            output: the paths in it begin with this one; the run's own folder is below it.
        """
        recipe = ROOT / "example_configs" / "axolotl" / f"qwen2-7b-{self.setting.adapter}.yml"
        config = yaml.safe_load(recipe.read_text())
        config |= {"attn_implementation": "sdpa"} | self.setting.keys
        balanced = self.method != "dpo"
        config = {
            key: value
            for key, value in config.items()
            if key not in _NOT_NEEDED and (balanced or not key.startswith(PREFIX))
        }
        data = {"ds_type": "json", "type": "chat_template.default", "split": "train"}
        config |= {
            "base_model": self.setting.model,
            "plugins": [_HOOKS, *(["bdpo_plugin.BDPOPlugin"] if balanced else [])],
            "rl": "bdpo" if balanced else "dpo",
            "datasets": [{"path": str(output / self.setting.pairs.name), **data}],
            "dataset_prepared_path": str(output / "prepared"),
            "output_dir": str(output / "model"),
            "seed": self.seed,
            "save_strategy": "no",
        }
        if balanced:
            config |= {"bdpo_cache_dir": str(output / "scores")}
        if self.method == "shuffled":
            config["bdpo_control"] = "shuffled:label"
        return config

    # The steps ----------------------------------------------------------------------------------

    @property
    def trained(self) -> Path | None:
        return None if self.seed is None else self.folder / "model"

    def files(self) -> dict[str, Path]:
        """Step -> the file that says it is done, in the order in which they are done."""
        files = {} if self.seed is None else {"train": self.folder / "train.json"}
        setting = self.setting
        if setting.tasks:
            include = sorted(setting.include.rglob("*.yaml")) if setting.include else []
            asked = [setting.tasks, setting.limit, _digest_of(include), version("lm_eval")]
            files["tasks"] = self.folder / f"tasks-{_digest(asked)}.json"
        if setting.prompts:
            asked = [_digest_of(setting.prompts), setting.tokens]
            files["answers"] = self.folder / f"answers-{_digest(asked)}.jsonl"
        return files

    def perform(self, step: str) -> None:
        """Do one step, unless it is done.

        Raises:
            StepError: it failed.
        """
        file = self.files()[step]
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            {"train": self._train, "tasks": self._tasks, "answers": self._answer}[step](file)

    def _train(self, file: Path) -> None:
        output = self.folder / "model"
        shutil.rmtree(output, ignore_errors=True)  # of a run that was cut off
        path = self.folder / "axolotl.yml"
        config = self.config(self.setting.output) | {"output_dir": str(output)}
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        start = time.monotonic()
        axolotl = str(Path(sys.executable).with_name("axolotl"))
        self._call("train", axolotl, "train", str(path), "--launcher", self.setting.launcher)
        seconds = time.monotonic() - start
        try:
            found = check(self.method, self.seed, config)
        except ValueError as error:
            raise StepError(f"{self.name}: {error}; see {self.folder / 'train.log'}") from error
        if (output / "adapter_config.json").is_file():
            for weights in output.glob("model*.safetensors*"):
                weights.unlink()  # the base model's, which Axolotl leaves beside an adapter
        _write(file, {"method": self.method, "seed": self.seed, "seconds": seconds, **found})

    def _tasks(self, file: Path) -> None:
        setting, raw = self.setting, self.folder / "lm_eval"
        shutil.rmtree(raw, ignore_errors=True)
        adapter = self.trained is not None and (self.trained / "adapter_config.json").is_file()
        full = self.trained is not None and not adapter
        model = {"pretrained": self.trained if full else setting.model, "tokenizer": setting.model}
        model |= {"peft": self.trained} if adapter else {}
        options = {
            "model_args": ",".join(f"{key}={value}" for key, value in model.items()),
            "tasks": ",".join(setting.tasks),
            "batch_size": setting.batch,
            "output_path": raw,
            "include_path": setting.include,
            "limit": setting.limit,
        }
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        for key, value in options.items():
            command += [] if value is None else [f"--{key}", str(value)]
        self._call("tasks", *command)
        if not (results := sorted(raw.rglob("results*.json"))):
            raise StepError(f"{self.name}: lm-eval left no results; see {self.folder}/tasks.log")
        found = json.loads(results[-1].read_text())
        kept = ("results", "higher_is_better", "n-shot", "n-samples", "versions")
        _write(file, {key: found.get(key) for key in kept})

    def _answer(self, file: Path) -> None:
        setting, temporary = self.setting, file.with_suffix(".tmp")
        job = {
            "files": setting.prompts,
            "output": temporary,
            "model": {
                "base": setting.model,
                "trained": self.trained,
                "batch": setting.batch,
                "tokens": setting.tokens,
            },
        }
        command = [sys.executable, "-m", "studies.real_models.refusal"]
        self._call("answers", *command, json.dumps(job, default=str))
        temporary.replace(file)

    def _call(self, step: str, *command: str) -> None:
        """Run a command, its output in ``STEP.log`` of the run's folder."""
        log = self.folder / f"{step}.log"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        imports = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("w") as stream:
            code = subprocess.run(
                command,
                cwd=self.folder,
                env=os.environ | {"PATH": path, "PYTHONPATH": imports},
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = "\n".join(lines[-8:])
            raise StepError(f"{self.name}, {step}: exit status {code}; log: {log}\n{last}")


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _digest_of(files: Iterable[Path]) -> str:
    return _digest([(file.name, file.read_text(encoding="utf-8")) for file in files])
