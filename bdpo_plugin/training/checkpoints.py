"""Writes a description of the run into its checkpoints, and checks whether another run can continue
exactly from a checkpoint. The trainer mixin calls both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.output.weighing_record import difference, in_words
from bdpo_plugin.settings import BDPOError
from bdpo_plugin.terminal import visible
from bdpo_plugin.training.template_dates import CLOCK, TemplateDates

#: The file with the description, in every folder to which a run saves weights.
FILE = "bdpo_run.json"
#: Entries of the description: digests of the training pairs with and without the dates that the
#: chat template writes; the date; the token ids of the null prompt.
PAIRS, UNDATED, DATE, NULL_PROMPT = "training pairs", "undated pairs", "date", "null prompt"
#: Entries of the description: digests of the reference's weights and of the tokenizer; digests of
#: everything that computes with these weights.
REFERENCE, COMPUTATION = "reference", "computation"
#: Entries of the description that are records of callables, or None if the run has none.
CALLABLES = ("weigh", "pair_loss")


def write_description(folder: str | Path, description: Mapping[str, Any]) -> None:
    """Writes the description of a run into a folder of saved weights."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def check_checkpoint(
    checkpoint: str | Path,
    description: Mapping[str, Any],
    tokenizer: Any,
    dates: TemplateDates | None,
    *,
    optimizer: bool = True,
) -> list[str]:
    """Refuses a checkpoint from which this run cannot continue exactly.

    Args:
        description: the description of this run, in the form of :func:`write_description`. An entry
            that is None in either description is unknown and not compared; for :data:`CALLABLES`,
            None means that the run has none.
        optimizer: whether the host saves the optimizer's state in a file of the folder.

    Returns:
        Warnings for the user about a checkpoint that can be continued.

    Raises:
        BDPOError: The checkpoint is missing or incomplete, was not written by a B-DPO run, or was
            written by a run with other data or settings.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise BDPOError(f"There is no checkpoint {folder} to continue from.")

    def refusal(why: str) -> BDPOError:
        return BDPOError(
            f"The checkpoint {folder} cannot be continued: {why}. Resume from another one "
            "(delete this one where the host picks the last), or begin anew in another folder."
        )

    if not (folder / "trainer_state.json").is_file():
        raise refusal("it has no trainer_state.json, as when a run is killed while it saves")
    if optimizer and not any((folder / f"optimizer.{end}").is_file() for end in ("pt", "bin")):
        raise refusal("it has no state of the optimizer (was `save_only_model` on?)")
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(f"it has no {FILE}, so it was not written by a B-DPO run") from None
    except (OSError, ValueError) as error:
        raise refusal(f"its {FILE} cannot be read ({error})") from error
    now = json.loads(json.dumps(description))
    changed, warnings = _compared(before, now, tokenizer, dates)
    if changed:
        raise refusal(f"it was written by a run that differs in {'; '.join(changed)}")
    return warnings


def _compared(
    before: dict[str, Any], now: dict[str, Any], tokenizer: Any, dates: TemplateDates | None
) -> tuple[list[str], list[str]]:
    """Compares two descriptions.

    Returns:
        The differences that forbid to continue, and warnings about the others.
    """
    changed, warnings = [], []
    for name in CALLABLES:
        there, here = before.pop(name, False), now.pop(name)
        differs = None if there is False else (there != here)
        if there and here:
            differs = difference(there, here)
        if differs:
            changed.append(f"`{name}`: {in_words(there)} there, {in_words(here)} here")
        elif differs is None and (there or here):
            told = "not recorded" if there is False else in_words(there)
            warnings.append(
                f"It is not known whether `{name}` is what the checkpoint was trained with: "
                f"{told} there, {in_words(here)} here."
            )
    nulls = before.pop(NULL_PROMPT, None), now.pop(NULL_PROMPT, None)
    undated = before.pop(UNDATED, None), now.pop(UNDATED, None)
    days = before.pop(DATE, None), now.pop(DATE, None)
    texts = [ids and str(tokenizer.decode(ids)) for ids in nulls]
    if None not in nulls and nulls[0] != nulls[1]:
        a, b = (dates.without(text) if dates else text for text in texts)
        if a != b:
            there, here = _apart(*texts)
            changed.append(f"the null prompt: {there} there, {here} here")
        else:
            warnings.append(_date_words(*days))
    pairs = before.pop(PAIRS, None), now.pop(PAIRS, None)
    if None not in pairs and pairs[0] != pairs[1]:
        if None in undated or undated[0] != undated[1]:
            changed.append(
                f"the training pairs: other ones, in another order, or tokenised otherwise (their "
                f"digests: {pairs[0]} there, {pairs[1]} here){_clock(tokenizer, undated)}"
            )
        else:
            warnings.append(_date_words(*days))
    computed = before.pop(COMPUTATION, None), now.pop(COMPUTATION, None)
    if None not in computed and computed[0] != computed[1]:
        warnings.append(
            "The reference's weights are those that the checkpoint was trained with, but not what "
            "computes with them: other releases of torch or transformers, another attention "
            "implementation, or other settings of a layer. Its scores are computed anew."
        )
    return [*changed, *_changes(before, now)], list(dict.fromkeys(warnings))


def _date_words(there: str | None, here: str | None) -> str:
    return (
        f"The chat template writes today's date into the prompts: {there} where the checkpoint was "
        f"trained, {here} here. Nothing else of the prompts has changed, so the run goes on."
    )


def _clock(tokenizer: Any, undated: tuple[Any, Any]) -> str:
    """Returns a sentence about a template that reads the clock in an unknown form; empty if it does
    not."""
    if CLOCK not in str(getattr(tokenizer, "chat_template", None)) or None not in undated:
        return ""
    return (
        f". The chat template reads the clock (`{CLOCK}`) in a form that is not known here: write "
        "a fixed date in its place"
    )


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), key)
    elif before is not None and now is not None and before != now:
        yield f"`{name}`: {before} there, {now} here"


def _apart(*texts: str) -> list[str]:
    """Returns a part of each of two texts, from shortly before their first difference."""
    pairs = zip(*texts, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(map(len, texts)))
    start = max(0, same - 40)
    parts = [text[start : start + 200] for text in texts]
    return [json.dumps(visible(part), ensure_ascii=False) for part in parts]
