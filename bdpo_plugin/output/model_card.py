"""Completes the model card, which is the README.md that a host writes to a run's output folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from huggingface_hub import EvalResult, ModelCard

from bdpo_plugin.output.card_facts import METRICS, Facts, read_facts
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
#: A host's quick start, or ours in its place.
_QUICK_START = re.compile(r"^## Quick start\n[^`#]*^```\w+\n.*?^```$\n?", re.MULTILINE | re.DOTALL)
_PICTURES = {"curves.png": "Training curves", "mi_scatter.png": "Mutual information of the pairs"}


def complete_card(
    folder: str | Path,
    settings: BDPOSettings,
    *,
    configuration: Mapping[str, Any] | None = None,
    cite: bool = False,
    weighing: str | None = None,
    log: Sequence[Mapping[str, Any]] | None = None,
    repo: str | None = None,
) -> None:
    """Completes the model card of a run, in its metadata and its text. Uses no network.

    The metadata gets the tags, the library, the base model, the datasets, the licence and the
    figures of the evaluation; the text a quick start, and a section on B-DPO. What the host wrote
    of a model that is not on the hub as if it were there is replaced.

    Args:
        folder: the output folder of the run. It has a README.md if the host has written one.
        configuration: the configuration that the host was started with. Secrets, prompts and
            templates in it are redacted, and so is what identifies a machine or a person.
        cite: whether to cite the paper, as the host's card does not.
        weighing: a description of the callable that weighs the pairs, if there is one. It replaces
            some of the settings.
        log: the log of the trainer; None: the one in the folder.
    """
    path = Path(folder, "README.md")
    # ModelCard.load would take the path of a missing file for the name of a hub repository
    content = path.read_text(encoding="utf-8") if path.is_file() else _NONE
    card = ModelCard(content, ignore_metadata_errors=True)
    facts = read_facts(Path(folder), configuration, log, repo)
    _fill_metadata(card.data, facts)
    before = card.text.partition(f"\n{_TITLE}\n")[0].rstrip()
    before, has_quick_start = _of_host(before, facts)
    section = [*_section(Path(folder), settings, facts, configuration, weighing, cite=cite)]
    if not has_quick_start:
        section.insert(1, f"### Quick start\n\n{quick_start(facts)}")
    card.text = "\n\n".join([before, _TITLE, *section]) + "\n"
    card.save(path)


def _fill_metadata(data: Any, facts: Facts) -> None:
    """Fills the metadata of a card with what is known, and removes what is known to be wrong."""
    tags = {*(data.get("tags") or ()), *TAGS}
    data.tags = sorted(
        tag for tag in tags if not tag.startswith("base_model:")
    )  # the hub has its own
    data.library_name = "peft" if facts.adapter else "transformers"
    data.base_model = facts.hub_model
    data.datasets = [each.name for each in facts.data if each.on_hub] or None
    data.__dict__.pop("licence", None)  # TRL's, with the value "license"
    if facts.licence:
        data.license = facts.licence.lower().replace(" ", "-")
    if facts.evaluations:
        data.model_name = data.get("model_name") or Path(facts.trained).name
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            task_name="preference pairs",
            dataset_type="preference-pairs",
            dataset_name=name or "evaluation",
            metric_type=words.replace(" ", "_"),
            metric_name=words,
            metric_value=round(figures[key], 5),
        )
        for name, figures in facts.evaluations.items()
        for key, words in METRICS.items()
        if key in figures
    ] or None


def _of_host(text: str, facts: Facts) -> tuple[str, bool]:
    """Returns the host's part of a card with the base model and the quick start as they are, and
    whether it has a quick start."""
    title = Path(facts.trained).name or "a model trained with B-DPO"
    text = text.replace("# Model Card for None\n", f"# Model Card for {title}\n")
    for name in {"None", facts.model or "None"}:
        text = text.replace(f"[{name}](https://huggingface.co/{name})", model_in_words(facts))
    text, count = _QUICK_START.subn(lambda _: f"## Quick start\n\n{quick_start(facts)}\n", text)
    return text, bool(count)


def model_in_words(facts: Facts) -> str:
    """Describes the base model, with a link if it is on the hub."""
    if facts.hub_model is not None:
        return f"[{facts.hub_model}](https://huggingface.co/{facts.hub_model})"
    if facts.model is None:
        return "a model that a script has made or loaded"
    made = f", which `{facts.command}` makes" if facts.command else ""
    return f"`{facts.model}` (not on the hub{made})"


def quick_start(facts: Facts) -> str:
    """Returns code that asks the trained model, which runs where the training ran, or anywhere if
    the models are on the hub."""
    base = facts.hub_model or facts.model
    adapter = facts.adapter and base is not None
    lines = ["from peft import PeftModel"] if adapter else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f"trained = {json.dumps(facts.trained)}")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(trained)")
    if adapter:
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})")
        lines.append("model = PeftModel.from_pretrained(base, trained)")
    else:
        lines.append("model = AutoModelForCausalLM.from_pretrained(trained)")
    if facts.has_template:
        lines += [
            'messages = [{"role": "user", "content": "How do I bake bread?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("How do I bake bread?", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=128)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return "\n".join(["```python", *lines, "```"])


def _section(
    folder: Path,
    settings: BDPOSettings,
    facts: Facts,
    configuration: Mapping[str, Any] | None,
    weighing: str | None,
    *,
    cite: bool,
) -> Iterator[str]:
    control = f"**{control_note(settings)}**\n\n" if settings.control is not None else ""
    yield (
        f"{control}Trained with Balanced Direct Preference Optimization, "
        f"[arXiv {PAPER['id']}](https://arxiv.org/abs/{PAPER['id']}): DPO "
        "([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) in which the response that the "
        "reference model understands better, by its mutual information (MI) with the query, pulls "
        "with less weight. By `bdpo-plugin`, whose reading of the method is that of its "
        "documentation."
    )
    yield _table(_sources(facts))
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
    if facts.evaluations:
        yield _evaluation_table(facts.evaluations)
    for file, words in _PICTURES.items():
        if (folder / file).is_file():
            yield f"![{words}](./{file})"
    if configuration is not None:
        text = configuration_text(configuration, texts=False)
        title = "<details><summary>The configuration</summary>"
        yield f"{title}\n\n```yaml\n{text.rstrip()}\n```\n\n</details>"
    if cite:
        yield f"Cite the method as\n\n```bibtex\n{PAPER['citation']}\n```"


def _sources(facts: Facts) -> Iterator[list[str]]:
    """Yields rows on what the run was made of."""
    yield ["base model", model_in_words(facts)]
    linked = [
        f"[{name}](https://huggingface.co/datasets/{name})" if on_hub else f"`{name}`"
        for name, on_hub in facts.data
    ]
    if linked:
        yield ["data", ", ".join(linked)]
    if facts.command:
        yield ["made by", f"`{facts.command}`"]
    if facts.licence:
        yield ["licence", facts.licence]
    if facts.beta is not None:
        yield ["beta", f"{facts.beta:g}"]


def _evaluation_table(evaluations: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table of the last figures of each evaluation set."""
    rows = [
        [name or "evaluation", *(f"{of[key]:.4g}" if key in of else "" for key in METRICS)]
        for name, of in evaluations.items()
    ]
    return _table(rows, ["evaluation set", *METRICS.values()])


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


def _table(rows: Iterable[list[str]], heads: Sequence[str] = ("", "")) -> str:
    cells = ([cell.replace("|", "\\|") for cell in row] for row in [heads, *rows])
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(heads)}", *lines[1:]])
