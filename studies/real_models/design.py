"""What is compared, with which settings: nothing else decides what a run is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

#: Types of XSTest's prompts that no training pair has: three families, each safe and unsafe.
HELD_OUT = (
    *("homonyms", "contrast_homonyms"),
    *("safe_targets", "contrast_safe_targets"),
    *("privacy_public", "privacy_fictional", "contrast_privacy"),
)
#: Of each arm: keys of B-DPO. `beta` is a factor of the preset's, `margin` SafeDPO's, in nats,
#: `half` that of twice as many pairs that is trained on (`material.half`).
ARMS: dict[str, dict[str, Any]] = {
    "dpo": {"bdpo_alpha": 0},
    "bdpo": {},
    "shuffled-label": {"bdpo_control": "shuffled:label"},
    "shuffled": {"bdpo_control": "shuffled"},
    "random": {"bdpo_control": "random"},
    "dpo-low": {"bdpo_alpha": 0, "beta": 1 / 3},
    "dpo-high": {"bdpo_alpha": 0, "beta": 3},
    "bw": {"bdpo_scaling": False},
    "sf": {"bdpo_balance": False},
    "safedpo": {"bdpo_alpha": 0, "margin": 2.0},
    "imbalanced": {"bdpo_alpha": 0, "half": "imbalanced"},
    "balanced": {"bdpo_alpha": 0, "half": "balanced"},
    "one-half": {"bdpo_alpha": 0, "half": "one"},
    "other-half": {"bdpo_alpha": 0, "half": "other"},
}
NAMES = {
    "untrained": "before training",
    "dpo": "DPO",
    "bdpo": "B-DPO",
    "shuffled-label": "control: MI shuffled within labels",
    "shuffled": "control: MI shuffled",
    "random": "control: random weights of the same spread",
    "dpo-low": "DPO, a third of beta",
    "dpo-high": "DPO, three times beta",
    "bw": "balance weights only (BW)",
    "sf": "scaling factor only (SF)",
    "safedpo": "SafeDPO, margin 2",
    "imbalanced": "DPO on the imbalanced half",
    "balanced": "DPO on the balanced half",
    "one-half": "control: DPO on a half by chance",
    "other-half": "control: DPO on the other half by chance",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The setting that all arms share; that of the presets was tuned for plain DPO (PLAN.md).

    Attributes:
        xstest, hh: pairs of each source; XSTest's are half of safe prompts. With a file of pairs
            ``hh`` are those of the file.
        tokens: the longest answer; it is cut after a sentence.
        beta, rate, epochs, rank: as everywhere. The adapter is on all linear layers.
        sft: weight of the negative log-likelihood of the chosen answer, in every arm.
        batch: pairs of an optimizer step.
    """

    xstest: int = 64
    hh: int = 32
    tokens: int = 48
    beta: float = 0.1
    rate: float = 1e-3
    epochs: int = 2
    rank: int = 16
    sft: float = 1.0
    batch: int = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is evaluated.

    Attributes:
        harmful, unsafe, safe, ordinary: prompts answered of each set.
        answer: the most tokens of an answer.
        hh: held-out pairs of hh-rlhf.
        nll: ordinary answers.
        likened: refusals, and helps, that are compared on a held-out prompt of XSTest.
    """

    harmful: int = 40
    unsafe: int = 24
    safe: int = 24
    ordinary: int = 16
    answer: int = 24
    hh: int = 40
    nll: int = 24
    likened: int = 1


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A command's worth of runs.

    Attributes:
        dtype: of the frozen weights; the adapter is in float32.
        alphas, betas: runs of B-DPO at each of these alphas by each of these factors of beta.
        at_a_time: prompts answered together.
        exploratory: arms that run when all seeds have `arms`; no claim waits for them.
        after: epochs after which log-probabilities are measured.
        hh_at_end: whether the held-out pairs are measured after the last of these epochs alone.
        answered: whether all is measured at the end, with answers.
        unseen: whether prompts and pairs are held out that no tuning has seen (`material.load`).
        plan: the file that says what is asked; empty where nobody has written one.
        model: what it is called in the tables.
        data: a digest of the file of pairs; empty for the sources of the study.
        tasks, limit: of lm-eval at the end, and the documents of each; None for all.
    """

    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    dtype: str
    training: Training = field(default_factory=Training)
    sizes: Sizes = field(default_factory=Sizes)
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = (1 / 3, 1, 3)
    at_a_time: int = 40
    exploratory: tuple[str, ...] = ()
    after: tuple[int, ...] = ()
    hh_at_end: bool = False
    answered: bool = True
    unseen: bool = False
    plan: str = "PLAN.md"
    model: str = "SmolLM2-135M-Instruct"
    data: str = ""
    tasks: tuple[str, ...] = ()
    limit: int | None = None

    def jobs(self) -> Iterator[Job]:
        """The model before training, then seed by seed all arms: what is there can be compared."""
        yield Job(preset=self, arm="untrained", seed=0)
        for arms in (self.arms, self.exploratory):
            for seed in self.seeds:
                for arm in arms:
                    yield Job(preset=self, arm=arm, seed=seed)
        for seed in self.seeds:
            for alpha in self.alphas:
                for factor in self.betas:
                    keys = {"bdpo_alpha": alpha, "beta": factor}
                    yield Job(preset=self, arm="grid", seed=seed, keys=keys)


class Where(NamedTuple):
    """Where a run finds what it needs.

    Attributes:
        model: a folder, or a name on the hub.
        data: the folder of the study's sources, or a file of pairs.
        evaluations: a folder with ``xstest/`` and ``strongreject/``, beside a file of pairs.
        work: where the scores of the reference are kept.
        include: a folder with further tasks of lm-eval.
    """

    model: str
    data: Path
    evaluations: Path | None
    work: Path
    include: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its evaluation."""

    preset: Preset
    arm: str
    seed: int
    keys: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of B-DPO, ``beta`` and ``margin`` of the run itself, ``half`` where it has one."""
        keys = {"bdpo_alpha": 1.5} | ARMS.get(self.arm, {}) | self.keys
        beta = self.preset.training.beta * keys.pop("beta", 1)
        return {"beta": beta, "margin": 0.0, **keys}

    @property
    def name(self) -> str:
        """Of its record: what it is, and a digest of all that it depends on."""
        training, sizes = asdict(self.preset.training), asdict(self.preset.sizes)
        parts = [self.arm, self.settings, self.seed, self.preset.dtype, training, sizes]
        if self.arm == "untrained":
            parts = [self.arm, self.preset.dtype, training["tokens"], sizes]
        parts += [self.preset.after] if self.preset.after else []
        parts += ["hh at the end"] if self.preset.hh_at_end else []
        named = [getattr(self.preset, name) for name in ("model", "data", "tasks", "limit")]
        parts += [named, self.preset.answered] if self.preset.data else []
        text = json.dumps(parts, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return f"{self.arm}-{self.seed}-{digest}"


_MAIN = tuple(arm for arm, keys in ARMS.items() if "half" not in keys)
_HALVES = tuple(arm for arm in ARMS if arm not in _MAIN)
_SECOND = Preset(
    seeds=tuple(range(10, 24)),
    arms=("dpo", "bdpo", "shuffled-label", "safedpo"),
    exploratory=("random", "dpo-low"),
    dtype="float32",
    training=Training(xstest=24, hh=8, epochs=8, sft=0.2),
    sizes=Sizes(hh=60, likened=2),
    after=(2, 8),
    hh_at_end=True,
    answered=False,
    unseen=True,
    plan="PLAN-2.md",
)
PRESETS = {
    "smollm2-cpu": Preset(
        seeds=(0, 1, 2), arms=_MAIN, dtype="bfloat16", alphas=(0.5, 1.0, 3.0), betas=(1,)
    ),
    "smollm2-cpu-halves": Preset(seeds=(0, 1, 2), arms=_HALVES, dtype="bfloat16"),
    "smollm2-gpu": Preset(
        seeds=tuple(range(10)),
        arms=_MAIN,
        dtype="bfloat16",
        sizes=Sizes(
            harmful=313, unsafe=75, safe=100, ordinary=150, answer=64, hh=400, nll=200, likened=4
        ),
        alphas=(0.5, 1.0, 2.0, 3.0),
        at_a_time=512,
    ),
    "plan-2": _SECOND,
    "plan-2-halves": replace(_SECOND, arms=_HALVES, exploratory=()),
}
#: Seeds of the tuning, which no table has.
TUNING_SEEDS = (900,)


def grid(preset: Preset) -> Iterator[Preset]:
    """Plain DPO in each setting that the tuning looks at."""
    for sft, rate, beta, epochs in (
        (0.0, 5e-4, 0.1, 2),
        (0.2, 5e-4, 0.1, 2),
        (0.2, 1e-3, 0.1, 2),
        (0.2, 1e-3, 0.3, 2),
        (1.0, 5e-4, 0.1, 2),
        (1.0, 1e-3, 0.1, 2),
    ):
        training = replace(preset.training, sft=sft, rate=rate, beta=beta, epochs=epochs)
        yield replace(preset, seeds=TUNING_SEEDS, arms=("dpo",), training=training)
