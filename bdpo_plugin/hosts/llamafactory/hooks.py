"""What autoload.py does to LLaMA-Factory's modules. Imported in its every process: nothing heavy.

LLaMA-Factory has no plugin mechanism, so its argument class and its DPO trainer are replaced, in
the tested releases alone. In another one only the former is, and it refuses `pref_loss: bdpo`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import wrapt

from bdpo_plugin.hosts.llamafactory.arguments import KEYS, PREF_LOSS, is_tested, with_bdpo
from bdpo_plugin.limits import check_complete
from bdpo_plugin.settings import PREFIX, RECIPE, BDPOError, BDPOSettings, unknown_key_message


def put_arguments(module: Any) -> None:
    """Put a subclass that knows B-DPO in the place of `FinetuningArguments`."""
    theirs, ours = module.FinetuningArguments, with_bdpo(module.FinetuningArguments)
    module.FinetuningArguments = ours
    # The package has it by name already where torch is first imported by a later module of it.
    package: Any = sys.modules[module.__name__.rpartition(".")[0]]
    if vars(package).get("FinetuningArguments") is theirs:
        package.FinetuningArguments = ours


#: What LLaMA-Factory was last given for its parser, and the configuration that it was made of.
_read: ContextVar[tuple[dict[str, Any], dict[str, Any]] | None] = ContextVar("read", default=None)


def wrap_read_args(module: ModuleType) -> None:
    """Wrap `llamafactory.hparams.parser.read_args`: an unknown ``bdpo_*`` key is told apart, and
    the description of a recipe, which its parser would refuse, is taken out."""
    if is_tested():
        wrapt.wrap_function_wrapper(module, "read_args", _read_args)


def _read_args(wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = wrapped(*args, **kwargs)
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
    """Wrap `CustomDPOTrainer`: a B-DPO run gets our subclass, any other run what it asked for."""
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
    """What LLaMA-Factory was started with, as others need it; None where that was no mapping."""
    from bdpo_plugin.hosts.llamafactory.side_effects import for_sharing

    read = _read.get()
    return None if read is None else for_sharing(read[1])


_running: ContextVar[bool] = ContextVar("a B-DPO run loads its data", default=False)


@contextmanager
def checking_rows(on: bool = True) -> Iterator[None]:
    """While it lasts, the rows that are loaded are those of a B-DPO run, or not."""
    before = _running.set(on)
    try:
        yield
    finally:
        _running.reset(before)


def wrap_workflow(module: ModuleType) -> None:
    """Wrap `llamafactory.train.dpo.workflow.run_dpo`: the data of a B-DPO run is known as such."""
    if is_tested():
        wrapt.wrap_function_wrapper(module, "run_dpo", _run_dpo)


def _run_dpo(wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    finetuning_args = kwargs["finetuning_args"] if "finetuning_args" in kwargs else args[3]
    training_args = kwargs["training_args"] if "training_args" in kwargs else args[2]
    ours = finetuning_args.pref_loss == PREF_LOSS
    if ours:
        from bdpo_plugin.hosts.llamafactory.reference import check_models

        check_models(kwargs["model_args"] if "model_args" in kwargs else args[0], finetuning_args)
    with checking_rows(ours):
        done = wrapped(*args, **kwargs)
    # with `save_on_each_node` one process of each machine saves, but one of all writes the card
    if ours and training_args.do_train and training_args.process_index == 0:
        from bdpo_plugin.output.model_card import complete_card

        # LLaMA-Factory writes it with a method of transformers' trainer, past that of ours
        settings = BDPOSettings.from_keys(vars(finetuning_args))
        folder = training_args.output_dir
        complete_card(folder, settings, configuration=_configuration(), cite=True)
    return done


def wrap_loader(module: ModuleType) -> None:
    """Wrap two functions of `llamafactory.data.loader`: what keeps a file of a B-DPO run from being
    loaded is told, and its rows are checked."""
    if is_tested():
        wrapt.wrap_function_wrapper(module, "_load_single_dataset", _load_single_dataset)
        wrapt.wrap_function_wrapper(module, "align_dataset", _align_dataset)


def _load_single_dataset(
    wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not _running.get():
        return wrapped(*args, **kwargs)
    from bdpo_plugin.hosts.llamafactory.raw_rows import load

    return load(wrapped, *args, **kwargs)


def _align_dataset(
    wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not _running.get():
        return wrapped(*args, **kwargs)
    from bdpo_plugin.hosts.llamafactory.raw_rows import align

    return align(wrapped, *args, **kwargs)


def wrap_train_tab(module: ModuleType) -> None:
    """Wrap LlamaBoard's `create_train_tab`: `bdpo` is among the choices of its loss."""
    if is_tested():
        wrapt.wrap_function_wrapper(module, "create_train_tab", _train_tab)


def _train_tab(wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    components = wrapped(*args, **kwargs)
    components["pref_loss"].choices.append((PREF_LOSS, PREF_LOSS))
    return components
