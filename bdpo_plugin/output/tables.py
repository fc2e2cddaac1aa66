"""Prints the tables of a run: its settings, problems in the data, and the scores.

Where the log level of transformers is `error` or higher (the host's `log_level`,
`TRANSFORMERS_VERBOSITY`), only warnings and problems are printed: nobody should have to find out
from a result that pairs were dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import get_verbosity

from bdpo_plugin.objective import BalanceWeights
from bdpo_plugin.output.score_file import mi_unit, quantiles
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.terminal import visible


def print_settings(
    settings: BDPOSettings,
    reference: str,
    null_prompt: NullPrompt,
    *,
    weighing: str | None = None,
    batches: str | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Prints the table of the settings of a run. The texts are descriptions for the user: of the
    reference, of a callable that weighs the pairs, and of the form of the scoring batches."""
    warnings = (*null_prompt.warnings, *warnings)
    if _quiet():
        for warning in (*warnings, *([control_note(settings)] if settings.control else [])):
            print_warning(warning)
        return
    table = _table("B-DPO")
    table.add_row("reference", _shown(reference))
    matched = ""
    if null_prompt.match_rate is not None:
        matched = f"; {null_prompt.match_rate:.1%} of the prompts begin and end so"
    table.add_row("null prompt", _shown(f"{null_prompt.text!r}\n{null_prompt.source}{matched}"))
    for warning in warnings:
        table.add_row("[bold red]WARNING", _shown(warning))
    if settings.control is not None:
        table.add_row("[bold red]CONTROL", f"[bold red]{_shown(control_note(settings))}")
    table.add_row("weights", _shown(weighting_in_words(settings, weighing)))
    unit = "nats per token" if settings.mi_normalize else "nats"
    table.add_row("mutual information", f"{settings.mi_estimator}, {unit}")
    when = "before training" if settings.precompute else "in each step"
    table.add_row("scored", f"{when}, {settings.score_tokens} tokens at a time")
    if batches is not None:
        table.add_row("batches", _shown(batches))
    _print(table)


def weighting_in_words(settings: BDPOSettings, weighing: str | None = None) -> str:
    """Describes how the pairs of a run are weighed: by its settings, or by a callable, of which
    `weighing` is a description."""
    if weighing is not None:
        return f"given as a callable: {weighing}"
    words = f"{settings.weighting}, alpha {settings.alpha:g}"
    if not settings.balance:
        words += ", balance weights off"
    if not settings.scaling:
        words += ", scaling factor off"
    return words


def control_note(settings: BDPOSettings) -> str:
    """Returns the note that marks all output of a run with `bdpo_control`."""
    column = settings.control_column
    weighed: dict[str | None, str] = {
        "shuffled": "another pair" + (f" of the same `{column}`" if column else ""),
        "swapped": "its two responses the wrong way round",
        "random": "another pair, in half of the cases the wrong way round",
    }
    return (
        f"`bdpo_control: {settings.control}`. This is not B-DPO but its control: each pair is "
        f"weighed by the mutual information of {weighed[settings.control_kind]}."
    )


def print_warning(warning: str) -> None:
    """Prints a table with one warning that arises after :func:`print_settings`."""
    table = _table("B-DPO")
    table.add_row("[bold red]WARNING", _shown(warning))
    _print(table)


def print_problems(problems: Sequence[str], title: str = "problems in the data") -> None:
    """Prints the table of problems, if there are any."""
    if problems:
        table = _table(f"[bold red]B-DPO: {title}")
        for problem in problems:
            table.add_row(_shown(problem))
        _print(table)


def print_scores(
    name: str, settings: BDPOSettings, scores: PairScores, weights: BalanceWeights
) -> None:
    """Prints the table of one dataset's scores."""
    if _quiet():
        return
    table = _table(f"B-DPO: the {_shown(name)} data")
    total, computed = len(scores.computed), int(scores.computed.sum())
    table.add_row("pairs", f"{total}: {computed} scored now, {total - computed} reused")
    unit = mi_unit(settings)
    if not scores.measured:
        table.add_row("MI", "not measured, as no weight depends on it: all are 1, as in DPO")
        _print(table)
        return
    for side, mi in (("chosen", scores.mi_chosen), ("rejected", scores.mi_rejected)):
        low, median, high = quantiles(mi, 0.05, 0.5, 0.95)
        table.add_row(
            f"MI {side}",
            f"{low:.3f} / {median:.3f} / {high:.3f} {unit} (5/50/95 %), "
            f"{(mi < 0).float().mean():.1%} below 0",
        )
    share = (scores.mi_chosen > scores.mi_rejected).float().mean()
    table.add_row("MI chosen > rejected", f"{share:.1%} of the pairs")
    for side, weight in (("chosen", weights.chosen), ("rejected", weights.rejected)):
        low, high = quantiles(weight, 0.05, 0.95)
        table.add_row(f"weight {side}", f"{low:.3f} to {high:.3f} (5 to 95 %)")
    table.add_row("mean scale", f"{weights.scale.mean():.3f}")
    _print(table)


def _shown(text: str) -> str:
    """Escapes rich's markup and the control characters of terminals."""
    return escape(visible(text))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False)


def _quiet() -> bool:
    return bool(get_verbosity() > logging.WARNING)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table)
