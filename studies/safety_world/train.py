"""One run: the pretrained model, trained by TRL's trainer or the package's, and evaluated."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bdpo_plugin import BDPOConfig, BDPOTrainer
from bdpo_plugin.reference.score_pairs import PairScores
from studies.safety_world import weighting
from studies.safety_world.data import training_pairs
from studies.safety_world.evaluate import evaluate, response_logps
from studies.safety_world.information import MARGINAL_QUERIES, Information, other_queries, survey
from studies.safety_world.pretrain import pretrained
from studies.safety_world.versions import package_digest
from studies.safety_world.world import Pair, World


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that a run depends on; `method` as in :mod:`weighting`, `data` as in :mod:`data`.

    With `looks`, the model is also evaluated after these epochs. `steps` and `hidden` are of the
    pretraining, `queries` the size of an evaluation set.
    """

    seed: int
    method: str
    data: str = "plain"
    pairs: int = 128
    epochs: int = 4
    beta: float = 0.3
    alpha: float = 1.5
    learning_rate: float = 3e-4
    batch: int = 16
    looks: tuple[int, ...] = ()
    steps: int = 1100
    hidden: int = 192
    queries: int = 48


class OutsideTrainer(BDPOTrainer):
    """B-DPO with :func:`weighting.outside` as the loss of each pair."""

    pair_loss = staticmethod(weighting.outside)


@lru_cache(maxsize=2)
def _base(seed: int, steps: int, hidden: int, work: Path) -> tuple[Any, ...]:
    """World, pretrained model, tokenizer, and the pairs of the evaluation with their logps."""
    world = World(seed)
    folder = pretrained(seed, work / "models", steps=steps, hidden=hidden)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = world.evaluation_pairs()
    return world, model, tokenizer, (held_out, response_logps(model, tokenizer, held_out))


def run(spec: Spec, work: Path) -> dict[str, Any]:
    """Train and evaluate; everything made on the way is kept under `work` for other runs.

    Returns:
        the measures of :func:`evaluate` at the end; ``looks``: the same after each of
        `spec.looks`; ``train_margin`` (nats), ``train_accuracy`` and ``loss`` of the last epoch;
        what :func:`_facts` has of the pairs and their weights; ``seconds``.
    """
    began = time.perf_counter()
    world, base, tokenizer, reference = _base(spec.seed, spec.steps, spec.hidden, work)
    if spec.method == "base":
        return evaluate(base, tokenizer, world, queries=spec.queries, reference=reference)
    scores = work / "scores" / package_digest()
    information = Information(base, tokenizer, scores)
    measure = _Looks(spec, tokenizer, world, reference)
    with TemporaryDirectory() as folder, _silence():
        pairs = training_pairs(world, spec.data, spec.pairs, information.scores)
        trainer = _trainer(spec, pairs, information, scores, folder, measure)
        facts = _facts(spec, pairs, information.scores(pairs), trainer)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    return {
        **(measure.found.get(str(spec.epochs)) or measure.measures(trainer.model)),
        "looks": measure.found,
        "train_margin": history[-1]["rewards/margins"] / spec.beta,
        "train_accuracy": history[-1]["rewards/accuracies"],
        "loss": history[-1]["loss"],
        **facts,
        "seconds": time.perf_counter() - began,
    }


def look(seed: int, steps: int, hidden: int, work: Path, **sizes: int) -> dict[str, Any]:
    """Experiment 1 on a seed's pretrained model; `sizes` of :func:`survey`."""
    world, model, tokenizer, _ = _base(seed, steps, hidden, work)
    with _silence():
        return survey(model, tokenizer, world, **sizes)


def _trainer(
    spec: Spec,
    pairs: list[Pair],
    information: Information,
    scores: Path,
    folder: str,
    measure: TrainerCallback,
) -> DPOTrainer:
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": spec.batch,
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.learning_rate,
        # no decay: after n epochs a long run is where a run of n epochs is
        "lr_scheduler_type": "constant",
        "beta": spec.beta,
        "seed": spec.seed,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    common = {
        "model": _copy(information.model),
        "train_dataset": Dataset.from_list([pair.to_trl() for pair in pairs]),
        "processing_class": information.tokenizer,
        "callbacks": [measure],
    }
    if spec.method == "dpo":
        return DPOTrainer(args=DPOConfig(**options, precompute_ref_log_probs=True), **common)
    keys = weighting.keys(spec.method, spec.alpha)
    marginal = None
    if spec.method.startswith("marginal:"):
        world = World(spec.seed)
        marginal = information.marginal(pairs, other_queries(world, MARGINAL_QUERIES, pairs))
    trainer = OutsideTrainer if spec.method.startswith("outside:") else BDPOTrainer
    return trainer(
        args=BDPOConfig(**options, **keys, bdpo_cache_dir=str(scores)),
        weigh=weighting.balance(
            spec.method, spec.alpha, [pair.types for pair in pairs], spec.seed, marginal
        ),
        **common,
    )


def _facts(
    spec: Spec, pairs: list[Pair], scores: PairScores, trainer: DPOTrainer
) -> dict[str, float]:
    """Of the pairs: their number, mean tokens and mean ``gap`` |I_w - I_l|, nats per token. Of the
    weights, if there are any: mean ``scale``, ``weight_sd`` of the chosen ones, and of a shuffle
    the share of the pairs that are left ``unmoved``."""
    facts = {
        "pairs": len(pairs),
        "gap": float((scores.mi_chosen - scores.mi_rejected).abs().mean()),
        "chosen_tokens": float(scores.chosen_tokens.float().mean()),
        "rejected_tokens": float(scores.rejected_tokens.float().mean()),
    }
    if spec.method == "dpo":
        return facts
    columns = ("bdpo_scale", "bdpo_weight_chosen")
    scale, chosen = (torch.tensor(trainer.train_dataset[name]) for name in columns)
    facts |= {"scale": float(scale.mean()), "weight_sd": float(chosen.std())}
    variant = spec.method.partition(":")[2]
    if variant in ("shuffled", "within"):
        order = weighting.shuffle(variant, [pair.types for pair in pairs], spec.seed)
        facts["unmoved"] = float((order == torch.arange(len(pairs))).float().mean())
    return facts


def _copy(model: Any) -> Any:
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    return made


class _Looks(TrainerCallback):
    """Evaluates in the course of training, without a trace in the random numbers."""

    def __init__(self, spec: Spec, tokenizer: Any, world: World, reference: Any) -> None:
        self.spec, self.tokenizer, self.world, self.reference = spec, tokenizer, world, reference
        self.found: dict[str, dict[str, Any]] = {}

    def measures(self, model: Any) -> dict[str, Any]:
        return evaluate(
            model,
            self.tokenizer,
            self.world,
            queries=self.spec.queries,
            reference=self.reference,
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if (epoch := round(state.epoch)) in self.spec.looks:
            self.found[str(epoch)] = self.measures(objects["model"])


@contextlib.contextmanager
def _silence() -> Any:
    """Neither tables nor bars of the many trainers."""
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
