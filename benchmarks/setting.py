"""What is run: model, data and training arguments, each a command-line option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

import click

#: The hosts that have a trainer of their own, a subclass of TRL's.
HOSTS = ("axolotl", "llamafactory")

#: What :func:`benchmarks.worker.run_parts` calls the parts of a run that are no preparation of
#: ours.
HOST_PART, FORWARDS = "the host's own preparation", "the forwards"

#: Options that a preset changes.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-21m": {},
    "cpu-lora": {  # LoRA as people train it: one pair a step, an output layer of 8 % of the body
        "host": "trl",
        "adapter": "lora",
        "gradient_checkpointing": True,
        "hidden": 512,
        "intermediate": 1536,
        "layers": 8,
        "heads": 8,
        "kv_heads": 8,
        "vocabulary": 4300,
        "pairs": 40,
        "batch": 1,
        "prompt": 60,
        "response": 60.0,
        "sigma": 0.2,
    },
    "gpu-7b": {  # Qwen2-7B
        "host": "trl",
        "device": "cuda",
        "dtype": "bfloat16",
        "adapter": "lora",
        "gradient_checkpointing": True,
        "hidden": 3584,
        "intermediate": 18944,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "vocabulary": 152064,
        "tied": False,
        "prompt": 256,
        "response": 480.0,
        "sigma": 0.4,
        "shortest": 256,
        "longest": 768,
    },
}


def _option(default: Any, text: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a benchmark; its fields are the options of :func:`setting_options`."""

    host: str = _option(
        next((name for name in HOSTS if find_spec(name)), "trl"),
        "Whose DPO trainer to compare with.",
        type=click.Choice([*HOSTS, "trl"]),
    )
    device: str = _option("cpu", "Where to run.", type=click.Choice(["cpu", "cuda"]))
    dtype: str = _option(
        "float32",
        "Of the weights; bfloat16 trains under autocast.",
        type=click.Choice(["float32", "bfloat16"]),
    )
    adapter: str = _option(
        "none",
        "Full fine-tune, LoRA on all linear layers, or that on 4-bit weights.",
        type=click.Choice(["none", "lora", "qlora"]),
    )
    rank: int = _option(16, "Of the LoRA matrices.")
    attention: str = _option("sdpa", "Attention implementation of transformers.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward.")
    hidden: int = _option(384, "Hidden size.")
    intermediate: int = _option(768, "Width of the feed-forward layers.")
    layers: int = _option(6, "Number of layers.")
    heads: int = _option(6, "Attention heads.")
    kv_heads: int = _option(6, "Key and value heads.")
    vocabulary: int = _option(32000, "Entries of the vocabulary.")
    tied: bool = _option(True, "Share the weights of embedding and output layer.")
    pairs: int = _option(64, "Preference pairs.")
    prompt: int = _option(40, "Tokens of a prompt.")
    response: float = _option(75.0, "Median of the responses' tokens, log-normal.")
    sigma: float = _option(0.6, "Spread of the logarithm of that length.")
    shortest: int = _option(8, "Fewest tokens of a response.")
    longest: int = _option(300, "Most tokens of a response.")
    batch: int = _option(4, "Pairs of a micro-batch.")
    seed: int = _option(0, "Of weights, data and order.")

    @property
    def on_disk(self) -> bool:
        """Whether the model has to be loaded from a folder: by LLaMA-Factory; by TRL, as the
        reference; or to be quantised."""
        return self.adapter != "lora" or self.host == "llamafactory"


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--preset`` and an option for each field of :class:`Setting` to a click command."""
    for entry in reversed(fields(Setting)):
        kind = dict(entry.metadata)
        name = f"--{entry.name.replace('_', '-')}"
        if isinstance(entry.default, bool):
            name += f"/--no-{entry.name.replace('_', '-')}"
        else:
            kind.setdefault("type", type(entry.default))
        command = click.option(name, default=entry.default, show_default=True, **kind)(command)
    return click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        default="cpu-21m",
        show_default=True,
        is_eager=True,
        expose_value=False,
        callback=_apply_preset,
        help="Values for the options below that are not given.",
    )(command)


def _apply_preset(context: click.Context, _: click.Parameter, name: str) -> None:
    context.default_map = {**PRESETS[name], **(context.default_map or {})}


def take_setting(options: dict[str, Any]) -> Setting:
    """Moves the setting's options out of a command's."""
    return Setting(**{entry.name: options.pop(entry.name) for entry in fields(Setting)})
