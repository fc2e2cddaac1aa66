"""What a run resolved at its start: the table on the screen and the file of scores."""

from __future__ import annotations

import hashlib
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from bdpo_plugin.objective import BalanceWeights
from bdpo_plugin.reference.dataset import PairScores
from bdpo_plugin.reference.null_prompt import NullPrompt
from bdpo_plugin.run.weighing import CallableRecord, settings_in_force
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.visible import visible


def score_file(name: str, content: str = "") -> str:
    """Name of the file of a dataset's scores.

    Args:
        name: of an evaluation set; "" for the training data.
        content: digest of the pairs of a set that was given later, which may have the name of
            another.
    """
    # what is not for the name of a file goes, and a digest of it keeps two such names apart
    safe = re.sub(r"[^\w.-]+", "_", name)[:80].strip(".")
    if safe != name:
        safe += "-" + hashlib.blake2b(name.encode(errors="replace"), digest_size=4).hexdigest()
    return ".".join(filter(None, ("reference_scores", safe, content[:8], "parquet")))


def save_scores(
    path: Path,
    rows: Sequence[int],
    scores: PairScores,
    weights: BalanceWeights,
    settings: BDPOSettings,
    groups: Sequence[str] | None = None,
    weighing: CallableRecord | None = None,
) -> None:
    """Write the scores of a dataset as Parquet, one row a pair, atomically.

    Columns: ``row`` in the host's tokenised dataset, token counts, log-probabilities in nats,
    MI where it was measured, weights and scale; and ``control_group``, where a control shuffled
    within groups. The file's metadata has the settings as ``bdpo_*``, the unit of the MI as
    ``mi_unit``, and as ``weigh`` the callable that weighed the pairs in the place of some
    settings. The MI is the pair's own under a control too; the weights are not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "row": list(rows),
            "chosen_tokens": scores.chosen_tokens.numpy(),
            "rejected_tokens": scores.rejected_tokens.numpy(),
            "ref_chosen_logps": scores.ref_chosen_logps.numpy(),
            "ref_rejected_logps": scores.ref_rejected_logps.numpy(),
            **(
                {"mi_chosen": scores.mi_chosen.numpy(), "mi_rejected": scores.mi_rejected.numpy()}
                if scores.measured
                else {}
            ),
            "weight_chosen": weights.chosen.numpy(),
            "weight_rejected": weights.rejected.numpy(),
            "scale": weights.scale.numpy(),
        }
    )
    if groups is not None:
        table = table.append_column("control_group", [list(groups)])
    metadata = {"mi_unit": mi_unit(settings)}
    in_force = settings_in_force(settings, weigh=weighing is not None)
    metadata |= {key: str(value) for key, value in in_force.items()}
    if weighing is not None:
        metadata["weigh"] = weighing.words()
    table = table.replace_schema_metadata(metadata)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # two runs may have one folder
    try:
        pq.write_table(table, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def print_settings(
    settings: BDPOSettings,
    reference: str,
    null_prompt: NullPrompt,
    *,
    weighing: str | None = None,
    batches: str | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """The table of what holds for the whole run.

    Args:
        weighing: the callable that weighs the pairs, if one does.
        batches: how the reference's are laid, where it has been tried by now.
    """
    table = _table("B-DPO")
    table.add_row("reference", _shown(reference))
    matched = ""
    if null_prompt.match_rate is not None:
        matched = f"; {null_prompt.match_rate:.1%} of the prompts begin and end so"
    table.add_row("null prompt", _shown(f"{null_prompt.text!r}\n{null_prompt.source}{matched}"))
    for warning in (*null_prompt.warnings, *warnings):
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
    """How the pairs of a run are weighed.

    Args:
        settings: of the run.
        weighing: the callable that weighs them, in words, if one does.
    """
    if weighing is not None:
        return f"given as a callable: {weighing}"
    words = f"{settings.weighting}, alpha {settings.alpha:g}"
    if not settings.balance:
        words += ", balance weights off"
    if not settings.scaling:
        words += ", scaling factor off"
    return words


def control_note(settings: BDPOSettings) -> str:
    """What a run with `bdpo_control` is to say of itself."""
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
    """A table of one warning that comes up later than those of :func:`print_settings`."""
    table = _table("B-DPO")
    table.add_row("[bold red]WARNING", _shown(warning))
    _print(table)


def print_problems(problems: Sequence[str]) -> None:
    """The table of what is wrong with the data, if anything is."""
    if problems:
        table = _table("[bold red]B-DPO: problems in the data")
        for problem in problems:
            table.add_row(_shown(problem))
        _print(table)


def print_store_problems(problems: Sequence[str]) -> None:
    """The table of what is wrong with the scores on disk."""
    table = _table("[bold red]B-DPO: problems with the stored scores")
    for problem in problems:
        table.add_row(_shown(problem))
    _print(table)


def print_scores(
    name: str, settings: BDPOSettings, scores: PairScores, weights: BalanceWeights
) -> None:
    """The table of one dataset's scores."""
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


def add_peak_memory(logs: dict[str, float], device: torch.device) -> None:
    """Add ``train_peak_memory_gib`` to the last log of a run, in place: the most memory that this
    process had at any time, the pass included; allocated on its GPU, or resident on the CPU."""
    if "train_runtime" not in logs:
        return
    if device.type == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    elif read := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        peak = read(device)
    else:
        return
    logs["train_peak_memory_gib"] = round(peak / 2**30, 3)


def mi_unit(settings: BDPOSettings) -> str:
    """The unit of a run's mutual information, in words."""
    return "nats per token" if settings.mi_normalize else "nats"


def quantiles(values: Tensor, *at: float) -> list[float]:
    """The values at some shares of the (n,) values in their order."""
    # torch.quantile refuses more than 2**24 values
    ordered = values.float().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in at]


def _shown(text: str) -> str:
    """As text and nothing else: neither rich's markup nor what a terminal obeys."""
    return escape(visible(text))


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table)
