"""Loads a model and its tokenizer, as they were trained, from the output folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdpo_plugin.output.run_folder import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Attention implementations that run on any machine, by the names of transformers.
_ANYWHERE = ("eager", "sdpa", "flex_attention")


def load_tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model or of a run.

    Args:
        name: a name on the hub, or a folder.
        template: the chat template to use if the tokenizer has none.

    Raises:
        click.ClickException: there is no tokenizer, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{name} has no tokenizer: {_line(error)}") from error
    tokenizer.chat_template = tokenizer.chat_template or template
    if tokenizer.chat_template is None:
        raise click.ClickException(f"the tokenizer of {name} has no chat template")
    return tokenizer


def load_trained_tokenizer(base: str, trained: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a run, with the tokens and the chat template used in training.

    Loads the tokenizer of `base` if the run saved none."""
    own = (trained / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(trained) if own else base)
    if template := _template_of_llamafactory(trained, tokenizer):
        tokenizer.chat_template = template
    return tokenizer


def load_trained(base: str, trained: Path) -> PreTrainedModel:
    """Loads the model of an output folder: an adapter on `base`, or fully fine-tuned weights.

    The base model gets the quantization, the dtype and the attention implementation of the
    training, as far as the run's folder records them.

    Raises:
        click.ClickException: the folder has no model, the base model cannot be loaded, or the
            adapter does not fit it.
    """
    # Look for an adapter first: Axolotl leaves a model.safetensors beside the adapter too.
    if (trained / "adapter_config.json").is_file():
        return _load_adapter(base, trained)
    if (trained / "config.json").is_file():
        return load_model(str(trained))
    raise click.ClickException(
        f"{trained} has neither adapter_config.json nor config.json: "
        "give the output folder of a finished run, or one of its checkpoint-* folders"
    )


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """Loads a causal language model in the dtype it was saved in, on the GPU if there is one.

    Args:
        name: a name on the hub, or a folder.
        options: options of transformers' `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "quantization_config" in options:  # weights are quantized on their device, and stay there
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (ImportError, OSError, ValueError) as error:
        raise click.ClickException(f"{name} cannot be loaded: {_line(error)}") from error
    return (model if "device_map" in options else model.to(device)).eval()


def _load_adapter(base: str, trained: Path) -> PreTrainedModel:
    from peft import PeftModel

    adapter = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    record = _record(trained)
    options = _options(base, trained, record)
    theirs = adapter.get("base_model_name_or_path")
    if theirs and not _same(base, theirs):
        _warn(
            f"{trained} was trained on {theirs}, and is shown on {base}. If that is another model, "
            "its answers are those of no model that was trained"
        )
    elif commit := adapter.get("revision") or record.get("model_commit"):
        options["revision"] = commit
    model = load_model(base, **options)
    try:
        rows = _vocabulary(trained, model)
        if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, str(trained)).eval()
        _as_saved(trained, adapted)
        return adapted
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(
            f"the adapter of {trained} cannot be put on {base}"
            f"{f' (it was trained on {theirs})' if theirs else ''}: {_line(error)}"
        ) from error


def _options(base: str, trained: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a run loaded its base model, as options of transformers' `from_pretrained`."""
    import torch
    from transformers import PretrainedConfig
    from transformers.quantizers.auto import AutoQuantizationConfig
    from transformers.utils import is_flash_attn_2_available

    options: dict[str, Any] = {}
    if isinstance(dtype := getattr(torch, str(record.get("dtype")), None), torch.dtype):
        options["dtype"] = dtype
    if attention := record.get("attention"):
        usable = attention in _ANYWHERE or (
            attention == "flash_attention_2" and is_flash_attn_2_available()
        )
        options["attn_implementation"] = attention if usable else "eager"
    quantised = record.get("quantization")
    if not record and (trained / "config.json").is_file():  # the run was not a B-DPO run
        config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
        quantised = config.get("quantization_config")
    if quantised is None and record.get("quantised"):
        raise click.ClickException(
            f"{trained} was trained on quantised weights by an earlier release, which did not "
            "write down how. Merge it (`axolotl merge-lora`, `llamafactory-cli export`), and give "
            "the merged model"
        )
    if quantised and "quantization_config" not in PretrainedConfig.get_config_dict(base)[0]:
        options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(quantised))
    return options


def _vocabulary(trained: Path, model: PreTrainedModel) -> int | None:
    """Returns the number of embedding rows in training, if the adapter has weights of them."""
    from safetensors import safe_open

    file = trained / "adapter_model.safetensors"
    if not file.is_file():
        return None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [f".{name}." for name, m in model.named_modules() if any(m is end for end in ends)]
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118
            if not any(name in key for name in names):
                continue
            shape: list[int] = weights.get_slice(key).get_shape()
            if "lora_embedding_A" in key:
                return shape[1]
            if "lora_B" in key or ("lora_" not in key and key.endswith("weight")):
                return shape[0]
    return None


def _as_saved(trained: Path, model: PreTrainedModel) -> None:
    """Casts an adapter to the dtype it was trained and saved in, as PEFT loads it as float32."""
    from safetensors import safe_open

    file = trained / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as weights:
        dtypes = {weights.get_tensor(key).dtype for key in weights.keys() if "lora_" in key}  # noqa: SIM118
    if len(dtypes) == 1:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(*dtypes)


def _template_of_llamafactory(trained: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the chat template of a LLaMA-Factory run, which may differ from the tokenizer's own.

    Returns None for other runs."""
    from importlib.util import find_spec

    import yaml

    if _record(trained).get("host") != "llamafactory":
        return None
    file = next((f for f in _beside(trained, "bdpo/recipe.yml") if f.is_file()), None)
    keys = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
    if not keys.get("template"):
        return None
    if find_spec("llamafactory") is None:
        _warn(
            f"{trained} was trained with `template: {keys['template']}` of LLaMA-Factory, which is "
            "not installed here: its prompts are written by the tokenizer's own template"
        )
        return None
    from bdpo_plugin.hosts.llamafactory.inspection import chat_template

    return chat_template(keys, tokenizer)


def _beside(trained: Path, name: str) -> tuple[Path, Path]:
    """Returns where a file of a run may be: in its folder, or in the parent of a checkpoint."""
    return trained / name, trained.resolve().parent / name


def _record(trained: Path) -> dict[str, Any]:
    own, above = _beside(trained, str(RECORD))
    is_checkpoint = trained.resolve().name.startswith("checkpoint-")
    path = above if is_checkpoint and not own.is_file() else own
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from error
    return record


def _same(base: str, theirs: str) -> bool:
    return base == theirs or Path(base).resolve() == Path(theirs).resolve()


def _line(error: BaseException) -> str:
    """Returns the first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _warn(words: str) -> None:
    from bdpo_plugin.terminal import visible

    click.echo(f"{click.style('warning', fg='yellow')}: {visible(words)}", err=True)
