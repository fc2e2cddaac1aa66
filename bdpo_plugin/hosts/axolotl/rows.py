"""The rows of a dataset before Axolotl's prompt strategy turns them into text, checked.

The strategies write a missing value as the text "None", and stop at what else they do not expect
without the number of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import wrapt
from datasets import DatasetDict

from bdpo_plugin.hosts.axolotl.resolve import MARK
from bdpo_plugin.rows import FILL, MessageForm, Problem, check_rows, kind_of, missing_columns
from bdpo_plugin.run.scored import saw

#: Columns that the strategies read as prompt and responses, where a dataset has them.
_READ = (
    "prompt",
    "input",
    "question",
    "chosen",
    "chosen_response",
    "rejected",
    "rejected_response",
)
#: What Axolotl renders a response behind, to cut it off again.
_DUMMY = "[[dummy_message]]"


def wrap_map_dataset(module: ModuleType) -> None:
    """Wrap `axolotl.utils.data.rl._map_dataset`, once: a B-DPO run's rows are checked."""
    function = getattr(module, "_map_dataset", None)
    if function is not None and not hasattr(function, "__wrapped__"):
        wrapt.wrap_function_wrapper(module, "_map_dataset", _map_dataset)


def _map_dataset(
    wrapped: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    cfg, dataset, transform = (given[k] for k in ("cfg", "dataset", "ds_transform_fn"))
    if not cfg.get(MARK):
        return wrapped(*args, **kwargs)
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"]
    name = next(iter(dataset.info.download_checksums or {}), "raw")
    strategy = _Strategy(transform)
    check_rows(dataset, name, strategy.problems)
    try:
        mapped = wrapped(*args, **kwargs)
    except Exception:
        more = {"tokenizer": given.get("tokenizer")} if strategy.wants_tokenizer else {}

        def raised(row: dict[str, Any]) -> Iterator[Problem]:
            try:
                transform(row, **more)
            except Exception as error:  # whatever a strategy or a template raises
                told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                yield f"the dataset's `type` raises {told}", "Change or remove these rows."

        check_rows(dataset, name, raised)
        raise
    if strategy.renders:
        check_rows(zip(dataset, mapped, strict=True), name, strategy.misread)
    saw(dataset, mapped)
    return mapped


class _Strategy:
    """What a prompt strategy reads of a row, as far as it can be told from its function."""

    def __init__(self, transform: Callable[..., Any]) -> None:
        known: Mapping[str, Any] = {}
        if inspect.isfunction(transform):
            known = inspect.getclosurevars(transform).nonlocals
        self.wants_tokenizer = "tokenizer" in inspect.signature(transform).parameters
        fields = [known[k] for k in ("field_messages", "field_prompt") if k in known]
        fields += [known[k] for k in ("field_chosen", "field_rejected") if k in known]
        self.renders = "message_property_mappings" in known
        self._fields = fields
        keys = known.get("message_property_mappings") or {}
        roles = known.get("role_map") or ()
        self._form = MessageForm(
            keys.get("role", "role"),
            keys.get("content", "content"),
            roles,
            "Name it in the dataset's `message_property_mappings`.",
            f"Name it in the dataset's `roles`: {', '.join(roles)} so far.",
            calls=False,
        )
        self._responses: tuple[Any, Any] = (known.get("field_chosen"), known.get("field_rejected"))

    def problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        """What is wrong with a row."""
        remedy = "Name it in the dataset's `field_...` keys."
        yield from missing_columns(row, self._fields, remedy)
        for column in self._fields or _READ:
            if column in row:
                yield from self._value(column, row[column])

    def _value(self, column: str, value: Any) -> Iterator[Problem]:
        if value is None:
            yield f"`{column}` is None", FILL
        elif isinstance(value, str):
            if self.renders and column in self._responses:
                yield from self._response(column, value)
        elif not isinstance(value, list | dict):
            yield f"`{column}` is {kind_of(value)}", "Write text, or a list of messages."
        elif not value:
            yield f"`{column}` is empty", FILL
        else:
            for message in [value] if isinstance(value, dict) else value:
                yield from self._message(column, message)

    def _message(self, column: str, message: Any) -> Iterator[Problem]:
        yield from self._form.problems(column, message)
        if isinstance(message, Mapping) and self.renders and column in self._responses:
            yield from self._response(column, message.get(self._form.content))

    @staticmethod
    def _response(column: str, text: Any) -> Iterator[Problem]:
        if text == "":
            words = f"`{column}` is empty, and Axolotl would train on the prompt's template instead"
            yield words, "Remove these rows."

    def misread(self, rows: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Iterator[Problem]:
        """Whether Axolotl cut a response at the wrong place out of what the template makes of it.

        It looks for the first place where the response's text is, which a word of the template may
        be as well, and takes the last character where there is none.

        Args:
            rows: a row of the data, and what became of it.
        """
        raw, made = rows
        for ours, theirs in zip(("chosen", "rejected"), self._responses, strict=True):
            message = raw[theirs][-1] if isinstance(raw[theirs], list) else raw[theirs]
            text = message if isinstance(message, str) else message[self._form.content]
            if not made[ours].startswith(text.rstrip()) or _DUMMY in made[ours]:
                words = f"Axolotl does not find the text of `{theirs}` in what the chat template "
                yield words + "makes of it", "Change these rows, or choose another template."
