"""``python -m studies.first_tokens``: would the mutual information of the first tokens do?

Measuring the mutual information runs each completion once more, after the null prompt. If its first
K tokens ranked the pairs as the whole completion does, the rest need not be run. This command
measures it with a model and pairs of your own: the rank correlation of I_w - I_l over the first K
tokens with I_w - I_l over all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from bdpo_plugin.reference.null_prompt import find_null_prompt
from bdpo_plugin.sources.forms import read_pairs, read_text

#: Tokens of a completion, or a share of it.
FIRST = (8, 16, 32, 64, 0.25, 0.5, 0.75)


def information(model: Any, prompt: list[int], null: list[int], completion: list[int]) -> Any:
    """(n,) pointwise mutual information of each of the n tokens of a completion, in nats."""

    def log_probabilities(before: list[int]) -> torch.Tensor:
        ids = torch.tensor([before + completion])
        logits = model(ids).logits[0, len(before) - 1 : -1].float()
        labels = ids[0, len(before) :, None]
        return logits.log_softmax(dim=-1).gather(-1, labels)[:, 0]

    with torch.no_grad():
        return (log_probabilities(prompt) - log_probabilities(null)).numpy()


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of (n,) and (n,) values without ties."""
    return float(spearmanr(one, other).statistic)


def first(values: np.ndarray, tokens: float) -> float:
    """The mean of the first tokens: so many, or that share of them."""
    count = tokens if tokens >= 1 else max(1, round(tokens * len(values)))
    return float(values[: int(count)].mean())


@click.command()
@click.option("--model", required=True, help="A folder, or a name on the hub.")
@click.option("--pairs", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--count", default=100, show_default=True, help="Pairs, the first that fit.")
@click.option("--max-tokens", default=640, show_default=True, help="Of a sequence.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers too.")
def main(model: str, pairs: Path, count: int, max_tokens: int, json_file: Path | None) -> None:
    """Print Spearman's rank correlation of the difference in mutual information (nats per token,
    chosen less rejected) over the first tokens with that over all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    fitting = []
    for pair in read_pairs(read_text(pairs), str(pairs)):
        prompt = tokenizer.apply_chat_template(
            pair["messages"], add_generation_prompt=True, tokenize=False
        )
        front = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        sides = [
            tokenizer(pair[side]["content"], add_special_tokens=False)["input_ids"]
            for side in ("chosen", "rejected")
        ]
        if all(sides) and max(map(len, sides)) + len(front) <= max_tokens:
            fitting.append((front, sides))
        if len(fitting) == count:
            break
    null = list(find_null_prompt(tokenizer, [np.array(front) for front, _ in fitting], None).ids)
    found = [
        [information(loaded, front, null, completion) for completion in sides]
        for front, sides in fitting
    ]
    whole = np.array([chosen.mean() - rejected.mean() for chosen, rejected in found])
    tokens = float(np.mean([len(values) for pair in found for values in pair]))
    result: dict[str, Any] = {"pairs": len(found), "mean tokens": tokens, "spearman": {}}
    click.echo(f"{len(found)} pairs, completions of {tokens:.0f} tokens on average")
    for share in FIRST:
        part = np.array([first(w, share) - first(r, share) for w, r in found])
        name = f"{share:.0%}" if share < 1 else f"first {share}"
        result["spearman"][name] = rank_correlation(part, whole)
        click.echo(f"{name:>9}: {result['spearman'][name]:.3f}")
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
