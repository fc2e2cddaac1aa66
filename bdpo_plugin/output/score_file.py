"""Writes the scores of a dataset to `OUTPUT_DIR/bdpo/reference_scores*.parquet`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from bdpo_plugin.atomic import written_whole
from bdpo_plugin.objective import BalanceWeights
from bdpo_plugin.output.weighing_record import active_settings, in_words
from bdpo_plugin.reference.score_pairs import PairScores
from bdpo_plugin.settings import BDPOSettings


def score_file(name: str, content: str = "") -> str:
    """Returns the name of the file with a dataset's scores.

    Args:
        name: the name of an evaluation set; "" for the training data.
        content: a digest of the pairs, for an evaluation set that was passed to the trainer later
            and may have the name of another one.
    """
    # Replace characters that do not belong in a file name. A digest keeps the results distinct.
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
    weighing: Mapping[str, Any] | None = None,
) -> None:
    """Writes the scores of a dataset atomically as Parquet, one row per pair.

    Columns: ``row`` (the position in the host's tokenised dataset), token counts, log-probabilities
    in nats, MI if it was measured, weights and scale, and ``control_group`` if a control shuffled
    within groups. The file's metadata has the settings as ``bdpo_*``, the unit of the MI as
    ``mi_unit``, and the callable that weighed the pairs instead of some settings, if any, as
    ``weigh``. With a control, the MI is still the pair's own, but the weights are not.
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
    active = active_settings(settings, weigh=weighing is not None)
    metadata |= {key: str(value) for key, value in active.items()}
    if weighing is not None:
        metadata["weigh"] = in_words(weighing)
    table = table.replace_schema_metadata(metadata)
    with written_whole(path) as temporary:
        pq.write_table(table, temporary)


def mi_unit(settings: BDPOSettings) -> str:
    """Returns the unit of a run's mutual information, for messages."""
    return "nats per token" if settings.mi_normalize else "nats"


def quantiles(values: Tensor, *at: float) -> list[float]:
    """Returns quantiles of the (n,) values: the sorted values nearest to the given fractions."""
    # torch.quantile refuses more than 2**24 values
    ordered = values.float().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in at]
