"""Completes the model card, which is the README.md that a host writes to a run's output folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from huggingface_hub import ModelCard

from bdpo_plugin.output.score_file import mi_unit, quantiles, score_file
from bdpo_plugin.output.tables import control_note
from bdpo_plugin.output.weighing_record import active_settings
from bdpo_plugin.redact import configuration_text, without_texts
from bdpo_plugin.settings import BDPOSettings

NAME = "B-DPO"
#: The paper, in the form that TRL's trainers use for citations.
PAPER = {
    "title": "Improving Safety Alignment via Balanced Direct Preference Optimization",
    "id": "2603.22829",
    "citation": """\
@article{zhao2026bdpo,
    title   = {{Improving Safety Alignment via Balanced Direct Preference Optimization}},
    author  = {Zhao, Shiji and Wang, Mengyang and Xiong, Shukun and Chen, Fangzhou and Zhu, Qihui and Ruan, Shouwei and Xiao, Yisong and Duan, Ranjie and Chen, Xun and Wei, Xingxing},
    journal = {arXiv preprint arXiv:2603.22829},
    year    = {2026},
}""",  # noqa: E501
}
TAGS = ("bdpo", "dpo")

_TITLE = f"## {NAME}"
#: The beginning of the card if the host has written none.
_NONE = "---\ntags: []\n---\n\n# A model trained with B-DPO\n"
_PICTURES = {"curves.png": "Training curves", "mi_scatter.png": "Mutual information of the pairs"}


def complete_card(
    folder: str | Path,
    settings: BDPOSettings,
    *,
    configuration: Mapping[str, Any] | None = None,
    cite: bool = False,
    weighing: str | None = None,
) -> None:
    """Adds the tags, the settings and the figures of a run to its model card. Uses no network.

    Args:
        folder: the output folder of the run. It has a README.md if the host has written one.
        settings: the settings of the run.
        configuration: the configuration that the host was started with. Secrets, prompts and
            templates in it are redacted, and so is what identifies a machine or a person.
        cite: whether to cite the paper, as the host's card does not.
        weighing: a description of the callable that weighs the pairs, if there is one. It replaces
            some of the settings.
    """
    path = Path(folder, "README.md")
    # ModelCard.load would take the path of a missing file for the name of a hub repository
    content = path.read_text(encoding="utf-8") if path.is_file() else _NONE
    card = ModelCard(content, ignore_metadata_errors=True)
    data: Any = card.data
    data.tags = sorted({*(data.get("tags") or ()), *TAGS})
    before = card.text.partition(f"\n{_TITLE}\n")[0].rstrip()
    section = "\n\n".join(_section(Path(folder), settings, configuration, weighing, cite=cite))
    card.text = f"{before}\n\n{_TITLE}\n\n{section}\n"
    card.save(path)


def _section(
    folder: Path,
    settings: BDPOSettings,
    configuration: Mapping[str, Any] | None,
    weighing: str | None,
    *,
    cite: bool,
) -> Iterator[str]:
    if settings.control is not None:
        yield f"**{control_note(settings)}**"
    yield (
        "Trained with Balanced Direct Preference Optimization, "
        f"[arXiv {PAPER['id']}](https://arxiv.org/abs/{PAPER['id']}): DPO "
        "([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) in which the response that the "
        "reference model understands better, by its mutual information (MI) with the query, pulls "
        "with less weight. By `bdpo-plugin`, whose reading of the method is that of its "
        "documentation."
    )
    keys = without_texts(active_settings(settings, weigh=weighing is not None))
    unset = {
        "bdpo_null_prompt": "derived",
        "bdpo_control": "none",
        "bdpo_score_tokens": "by the device",
    }
    yield _table(
        [f"`{key}`", unset[key] if value is None else f"`{value!r}`"] for key, value in keys.items()
    )
    if weighing is not None:
        yield f"The pairs are weighed by a callable of its author's: `{weighing}`."
    if (scores := folder / "bdpo" / score_file("")).is_file():
        yield _figures(scores, mi_unit(settings))
    for file, words in _PICTURES.items():
        if (folder / file).is_file():
            yield f"![{words}](./{file})"
    if configuration is not None:
        text = configuration_text(configuration, texts=False)
        title = "<details><summary>The configuration</summary>"
        yield f"{title}\n\n```yaml\n{text.rstrip()}\n```\n\n</details>"
    if cite:
        yield f"Cite the method as\n\n```bibtex\n{PAPER['citation']}\n```"


def _figures(scores: Path, unit: str) -> str:
    table = pq.read_table(scores)
    rows = [["training pairs", str(table.num_rows)]]
    for name, words in (
        ("mi_chosen", f"MI of chosen, {unit} (5/50/95 %)"),
        ("mi_rejected", f"MI of rejected, {unit} (5/50/95 %)"),
        ("weight_chosen", "weight of chosen (5/50/95 %)"),
        ("weight_rejected", "weight of rejected (5/50/95 %)"),
    ):
        if name in table.column_names:
            found = quantiles(torch.tensor(table[name].to_numpy()), 0.05, 0.5, 0.95)
            rows.append([words, " / ".join(f"{value:.3f}" for value in found)])
    if "mi_chosen" not in table.column_names:
        rows.append(["MI", "not measured, as no weight depends on it"])
        return _table(rows)
    higher = (table["mi_chosen"].to_numpy() > table["mi_rejected"].to_numpy()).mean()
    rows.append(["pairs in which chosen has the higher MI", f"{higher:.1%}"])
    return _table(rows)


def _table(rows: Iterable[list[str]]) -> str:
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(["| | |", "| --- | --- |", *(f"| {' | '.join(row)} |" for row in cells)])
