"""The hooks that autoload.py runs on LLaMA-Factory's modules.

Every LLaMA-Factory process imports this file, so it imports nothing heavy. LLaMA-Factory has no
plugin mechanism, so the hooks replace its argument class and its DPO trainer. They replace both in
the tested releases only. In any other release they replace the argument class alone, which then
refuses `pref_loss: bdpo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import wrapt

from bdpo_plugin.hosts.llamafactory.arguments import KEYS, PREF_LOSS, is_tested, with_bdpo
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.limits import check_complete
from bdpo_plugin.settings import PREFIX, RECIPE, BDPOError, BDPOSettings, unknown_key_message


def _wrap(module: ModuleType, name: str, around: Callable[[Call, Arguments], Any]) -> None:
    if is_tested():
        wrap(module, name, around)


def put_arguments(module: Any) -> None:
    """Replaces `FinetuningArguments` by a subclass that supports B-DPO."""
    theirs, ours = module.FinetuningArguments, with_bdpo(module.FinetuningArguments)
    module.FinetuningArguments = ours
    # If a later module of the package imports torch first, the package already holds the class.
    package: Any = sys.modules[module.__name__.rpartition(".")[0]]
    if vars(package).get("FinetuningArguments") is theirs:
        package.FinetuningArguments = ours


#: The last mapping returned to LLaMA-Factory's parser, and the configuration it was made from.
_read: ContextVar[tuple[dict[str, Any], dict[str, Any]] | None] = ContextVar("read", default=None)


def wrap_read_args(module: ModuleType) -> None:
    """Wraps `llamafactory.hparams.parser.read_args`.

    The wrapper raises a helpful error for an unknown ``bdpo_*`` key, and removes the recipe's
    description, which LLaMA-Factory's parser would refuse."""
    _wrap(module, "read_args", _read_args)


def _read_args(call: Call, given: Arguments) -> Any:
    found = call()
    for key in _keys(found):
        if key.startswith(PREFIX) and key not in (*KEYS, RECIPE):
            raise BDPOError(unknown_key_message(key))
    last = _read.get()
    if not isinstance(found, dict):
        _read.set(None)
        return found
    if last is not None and found is last[0]:
        return found
    if found.get("pref_loss") == PREF_LOSS:
        check_complete(found)
    rest = {key: value for key, value in found.items() if key != RECIPE}
    _read.set((rest, found))
    return rest


def _keys(arguments: dict[str, Any] | list[str]) -> Iterable[str]:
    if isinstance(arguments, dict):
        return map(str, arguments)
    options = (a.partition("=")[0] for a in arguments if a.startswith("--"))
    return (option.removeprefix("--").replace("-", "_") for option in options)


def wrap_trainer(module: ModuleType) -> None:
    """Wraps `CustomDPOTrainer`, so that a B-DPO run gets our subclass and any other run its own."""
    if is_tested():
        wrapt.wrap_function_wrapper(module, "CustomDPOTrainer", _trainer)


def _trainer(wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    finetuning_args = kwargs["finetuning_args"] if "finetuning_args" in kwargs else args[2]
    if finetuning_args.pref_loss != PREF_LOSS:
        return wrapped(*args, **kwargs)
    from bdpo_plugin.hosts.llamafactory.trainer import LlamaFactoryBDPOTrainer

    trainer = LlamaFactoryBDPOTrainer(*args, **kwargs)
    trainer.configuration = _configuration()
    return trainer


def _configuration() -> dict[str, Any] | None:
    """Returns the configuration that LLaMA-Factory was started with, for sharing.

    Returns None if it was not started with a mapping."""
    from bdpo_plugin.hosts.llamafactory.side_effects import for_sharing

    read = _read.get()
    return None if read is None else for_sharing(read[1])


_running: ContextVar[bool] = ContextVar("a B-DPO run loads its data", default=False)


@contextmanager
def checking_rows(on: bool = True) -> Iterator[None]:
    """Context manager that sets whether rows are loaded for a B-DPO run and must be checked."""
    before = _running.set(on)
    try:
        yield
    finally:
        _running.reset(before)


def wrap_workflow(module: ModuleType) -> None:
    """Wraps `llamafactory.train.dpo.workflow.run_dpo`, to check models and rows of B-DPO runs."""
    _wrap(module, "run_dpo", _run_dpo)


def _run_dpo(call: Call, given: Arguments) -> Any:
    finetuning_args, training_args = given["finetuning_args"], given["training_args"]
    ours = finetuning_args.pref_loss == PREF_LOSS
    if ours:
        from bdpo_plugin.hosts.llamafactory.reference import check_models

        check_models(given["model_args"], finetuning_args)
    with checking_rows(ours):
        done = call()
    # With `save_on_each_node` one process on each machine saves, but only one process in total
    # writes the model card.
    if ours and training_args.do_train and training_args.process_index == 0:
        from bdpo_plugin.output.model_card import complete_card

        # LLaMA-Factory writes the card by a method of transformers' Trainer, not by ours
        settings = BDPOSettings.from_keys(vars(finetuning_args))
        folder = training_args.output_dir
        complete_card(folder, settings, configuration=_configuration(), cite=True)
    return done


def wrap_loader(module: ModuleType) -> None:
    """Wraps two functions of `llamafactory.data.loader` for B-DPO runs.

    The wrappers explain why a file cannot be loaded, and check its rows."""
    _wrap(module, "_load_single_dataset", _load_single_dataset)
    _wrap(module, "align_dataset", _align_dataset)


def _load_single_dataset(call: Call, given: Arguments) -> Any:
    if not _running.get():
        return call()
    from bdpo_plugin.hosts.llamafactory.raw_rows import load

    return load(call, given)


def _align_dataset(call: Call, given: Arguments) -> Any:
    if not _running.get():
        return call()
    from bdpo_plugin.hosts.llamafactory.raw_rows import align

    return align(call, given)


def wrap_train_tab(module: ModuleType) -> None:
    """Wraps LlamaBoard's `create_train_tab`, to add `bdpo` to the choices of the loss."""
    _wrap(module, "create_train_tab", _train_tab)


def _train_tab(call: Call, given: Arguments) -> Any:
    components = call()
    loss = components["pref_loss"]
    loss.choices.append((PREF_LOSS, PREF_LOSS))
    # gradio makes the field anew from these when the page sets its language
    made_of = loss.constructor_args
    made_of["choices"] = [*made_of["choices"], PREF_LOSS]
    return components


def wrap_clean_cmd(module: ModuleType) -> None:
    """Wraps LlamaBoard's `_clean_cmd`, which leaves out what is false: our keys may be true by
    default."""
    _wrap(module, "_clean_cmd", _clean_cmd)


def _clean_cmd(call: Call, given: Arguments) -> Any:
    ours = {k: v for k, v in given["args"].items() if k in KEYS and v is False}
    return {**call(), **ours}
