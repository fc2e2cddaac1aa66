"""One job: a training with LoRA by this package's TRL trainer, and its evaluation."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import replace
from functools import cached_property
from operator import sub
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from bdpo_plugin import BalanceWeights, BDPOConfig, BDPOTrainer, ChosenRejected
from bdpo_plugin.data.recorded_sources import recording_sources
from bdpo_plugin.sources.forms import Pair
from studies.real_models.design import Job, Preset, Where
from studies.real_models.evaluate import Evaluation
from studies.real_models.material import Material, half, load, load_file
from studies.real_models.tasks import score

#: Of the training pairs, kept in the record.
_COLUMNS = ("row", "mi_chosen", "mi_rejected", "weight_chosen", "weight_rejected")


class SafeDPOTrainer(BDPOTrainer):
    """DPO with a margin for each pair, in the place of its scale (arXiv 2505.20065).

    The loss is -log sigmoid(beta (log-ratio chosen - log-ratio rejected) - margin), the margin
    being 0 where the rejected answer is safe.
    """

    @staticmethod
    def pair_loss(
        policy: ChosenRejected,
        reference: ChosenRejected,
        weights: BalanceWeights,
        *,
        beta: float,
        **_: Any,
    ) -> Tensor:
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        difference = chosen - rejected
        return -F.logsigmoid(beta * difference - (weights.scale - 1))


class Bench:
    """Model and data of a preset, read once for all jobs of a process.

    Args:
        where: with the data of the study, see :func:`load`, or a file, see :func:`load_file`.
    """

    def __init__(self, preset: Preset, where: Where) -> None:
        disable_progress_bars()
        self.preset, self.path, self.where = preset, where.model, where
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(where.model)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        read = self.tokenizer, preset.training.tokens, preset.sizes
        self.material: Material = (
            load_file(where.data, where.evaluations, *read)
            if preset.data
            else load(where.data, *read, unseen=preset.unseen)
        )

    @cached_property
    def evaluation(self) -> Evaluation:
        material, sizes = self.material, self.preset.sizes
        kept, rows = self.where.work / "reference", self.preset.at_a_time
        return Evaluation(material, self.model(), self.tokenizer, sizes, rows, kept)

    def model(self) -> nn.Module:
        """The model before training."""
        dtype = getattr(torch, self.preset.dtype)
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).to(self.device).eval()

    def run(self, job: Job) -> dict[str, Any]:
        """The record of a job: every measure of :class:`Evaluation`, and the training's figures."""
        began = time.perf_counter()
        if job.arm == "untrained":
            return {**self._measured(self.model()), "seconds": time.perf_counter() - began}
        pairs = self.pairs(job)
        evaluated = AfterEpochs(self.evaluation, self.preset)
        with TemporaryDirectory() as output:
            trainer = self.trainer(job, pairs, Path(output))
            trainer.add_callback(evaluated)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        model = trainer.model.eval()
        trained = time.perf_counter() - began
        curve = _curve(trainer.state.log_history, job)
        data = trainer.train_dataset
        return {
            **(self._measured(model) if self.preset.answered else {}),
            **curve[-1],
            "after": evaluated.found,
            "curve": curve,
            "imbalance": _imbalance(data),
            **{name: list(data[f"bdpo_{name}"]) for name in _COLUMNS},
            "train_seconds": trained,
            "seconds": time.perf_counter() - began,
        }

    def _measured(self, model: nn.Module) -> dict[str, Any]:
        """All that is measured of a model at the end."""
        if not self.preset.answered:
            return self.evaluation.preferences(model)
        found = self.evaluation(model)
        if self.preset.tasks:
            found["tasks"] = score(
                model,
                self.tokenizer,
                self.preset.tasks,
                self.preset.limit,
                self.where.include,
            )
        return found

    def pairs(self, job: Job) -> list[Pair]:
        """The training pairs of a job."""
        training, name = job.preset.training, job.settings.get("half")
        if not name:
            return self.material.training(training, job.seed)
        twice = replace(training, xstest=2 * training.xstest, hh=2 * training.hh)
        pairs = self.material.training(twice, job.seed)
        with TemporaryDirectory() as output:
            scored = self.trainer(job, pairs, Path(output)).train_dataset
        gaps = [*map(abs, _imbalance(scored))]
        lengths = [map(len, scored[side]) for side in ("chosen_ids", "rejected_ids")]
        tokens = list(zip(*lengths, strict=True))
        return half([pairs[row] for row in scored["bdpo_row"]], gaps, tokens, name, job.seed)

    def trainer(self, job: Job, pairs: list[Pair], output: Path) -> BDPOTrainer:
        """The trainer of a job, with the model, the adapter and the scored pairs.

        Args:
            output: an empty folder, where it leaves its scores.
        """
        training, settings = job.preset.training, job.settings
        keys = {key: value for key, value in settings.items() if key.startswith("bdpo_")}
        args = BDPOConfig(
            output_dir=str(output),
            beta=settings["beta"],
            loss_type=["sigmoid", "sft"] if training.sft else ["sigmoid"],
            loss_weights=[1.0, training.sft] if training.sft else None,
            learning_rate=training.rate,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=min(training.batch, 8),
            gradient_accumulation_steps=max(1, training.batch // 8),
            warmup_steps=2,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=self.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=None,
            seed=job.seed,
            bdpo_cache_dir=str(self.where.work / "scores"),
            **keys,
        )
        set_seed(job.seed)  # of the adapter: the arms of a seed begin with the same one
        rank = training.rank
        safe = settings["margin"] > 0
        # watched, so that the mutual information is measured in arms that weigh nothing too
        with contextlib.redirect_stdout(io.StringIO()), recording_sources():
            return (SafeDPOTrainer if safe else BDPOTrainer)(
                self.model(),
                args=args,
                train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
                weigh=safety_margins(settings["margin"]) if safe else None,
            )


class AfterEpochs(TrainerCallback):
    """Measures the log-probabilities of a model in training after some of its epochs.

    Attributes:
        found: epoch, as text -> the measures.
    """

    def __init__(self, evaluation: Evaluation, preset: Preset) -> None:
        self.evaluation, self.preset = evaluation, preset
        self.found: dict[str, dict[str, Any]] = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        after, epoch = self.preset.after, round(state.epoch)
        if epoch in after:
            hh = epoch == after[-1] or not self.preset.hh_at_end
            self.found[str(epoch)] = self.evaluation.preferences(model.eval(), hh=hh)
            model.train()


def _curve(history: list[dict[str, Any]], job: Job) -> list[dict[str, float]]:
    """Of each epoch the means over its steps; margins and log-ratios in nats."""
    steps = [entry for entry in history if "rewards/margins" in entry]
    epochs, beta = job.preset.training.epochs, job.settings["beta"]
    each = len(steps) // epochs
    return [
        {
            "train_loss": fmean(entry["loss"] for entry in some),
            "train_margin": fmean(entry["rewards/margins"] for entry in some) / beta,
            "train_accuracy": fmean(entry["rewards/accuracies"] for entry in some),
            "train_chosen": fmean(entry["rewards/chosen"] for entry in some) / beta,
        }
        for some in (steps[each * epoch : each * (epoch + 1)] for epoch in range(epochs))
    ]


def _imbalance(scored: Dataset) -> list[float]:
    """Of each pair the mutual information of chosen less rejected, nats per token."""
    return [*map(sub, scored["bdpo_mi_chosen"], scored["bdpo_mi_rejected"])]


def _row(pair: Pair) -> dict[str, Any]:
    """A pair as TRL reads it, with its label."""
    return {
        "label": pair["label"],
        "prompt": pair["messages"],
        "chosen": [pair["chosen"]],
        "rejected": [pair["rejected"]],
    }


def safety_margins(margin: float) -> Any:
    """Weights of 1, and as scale 1 and the margin of each pair whose rejected answer is unsafe."""

    def weigh(mi_chosen: Tensor, mi_rejected: Tensor, *, label: list[str]) -> BalanceWeights:
        # XSTest's of unsafe prompts; hh-rlhf says nothing of the kind
        ones = torch.ones_like(mi_chosen)
        unsafe = torch.tensor([float(kind == "unsafe") for kind in label]).to(ones)
        return BalanceWeights(ones, ones, ones + margin * unsafe)

    return weigh
