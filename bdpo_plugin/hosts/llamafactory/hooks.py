"""The hooks that autoload.py runs on LLaMA-Factory's modules.

Every LLaMA-Factory process imports this file, so it imports nothing heavy. LLaMA-Factory has no
plugin mechanism, so the hooks replace its argument class and its DPO trainer. They replace both in
the tested releases only. In any other release they replace the argument class alone, which then
refuses `pref_loss: bdpo`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from bdpo_plugin.hosts.llamafactory.arguments import KEYS, PREF_LOSS, is_tested, with_bdpo
from bdpo_plugin.hosts.wrapping import Arguments, Call, wrap
from bdpo_plugin.limits import check_complete
from bdpo_plugin.settings import PREFIX, RECIPE, BDPOError, BDPOSettings, unknown_key_message


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


def _read_args(call: Call, given: Arguments) -> Any:
    """Raises a helpful error for an unknown ``bdpo_*`` key, and removes the recipe's description,
    which LLaMA-Factory's parser would refuse."""
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


def _trainer(call: Call, given: Arguments) -> Any:
    """Makes our trainer for a B-DPO run, and LLaMA-Factory's own for any other run."""
    if given["finetuning_args"].pref_loss != PREF_LOSS:
        return call()
    from bdpo_plugin.hosts.llamafactory.trainer import LlamaFactoryBDPOTrainer

    more = given.pop("kwargs", {})
    trainer = LlamaFactoryBDPOTrainer(**given, **more)
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


def _run_dpo(call: Call, given: Arguments) -> Any:
    """Checks the models and the rows of a B-DPO run, and completes its model card."""
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


def _load_single_dataset(call: Call, given: Arguments) -> Any:
    """Explains why a file of a B-DPO run cannot be loaded."""
    if not _running.get():
        return call()
    from bdpo_plugin.hosts.llamafactory.raw_rows import load

    return load(call, given)


def _align_dataset(call: Call, given: Arguments) -> Any:
    """Checks the rows of a B-DPO run."""
    if not _running.get():
        return call()
    from bdpo_plugin.hosts.llamafactory.raw_rows import align

    return align(call, given)


def _train_tab(call: Call, given: Arguments) -> Any:
    """Adds `bdpo` to the choices of the loss in LlamaBoard."""
    components = call()
    loss = components["pref_loss"]
    loss.choices.append((PREF_LOSS, PREF_LOSS))
    # gradio makes the field anew from these when the page sets its language
    made_of = loss.constructor_args
    made_of["choices"] = [*made_of["choices"], PREF_LOSS]
    return components


def _clean_cmd(call: Call, given: Arguments) -> Any:
    """Keeps our keys that are false, which LlamaBoard leaves out: they may be true by default."""
    ours = {k: v for k, v in given["args"].items() if k in KEYS and v is False}
    return {**call(), **ours}


#: Module of LLaMA-Factory -> the names of functions and classes -> what is called in their place.
_WRAPPERS = {
    "llamafactory.hparams.parser": {"read_args": _read_args},
    "llamafactory.train.dpo.trainer": {"CustomDPOTrainer": _trainer},
    "llamafactory.train.dpo.workflow": {"run_dpo": _run_dpo},
    "llamafactory.data.loader": {
        "_load_single_dataset": _load_single_dataset,
        "align_dataset": _align_dataset,
    },
    "llamafactory.webui.components.train": {"create_train_tab": _train_tab},
    "llamafactory.webui.common": {"_clean_cmd": _clean_cmd},
}


def wrap_functions(module: ModuleType) -> None:
    """Wraps the functions of a module that :data:`_WRAPPERS` names, in the tested releases only."""
    if is_tested():
        for name, around in _WRAPPERS[module.__name__].items():
            wrap(module, name, around)
