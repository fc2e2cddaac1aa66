"""`bdpo answers`: shows what a model generates before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdpo_plugin.cli.load_trained import (
    load_model,
    load_tokenizer,
    load_trained,
    load_trained_tokenizer,
)
from bdpo_plugin.cli.no_side_effects import no_side_effects
from bdpo_plugin.cli.options import EXISTING_FILE, EXISTING_FOLDER, JSON, cell, console
from bdpo_plugin.output.run_folder import named
from bdpo_plugin.recipes.host_config import check_model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@click.command()
@click.argument("base")
@click.argument("trained", nargs=-1, required=True, type=EXISTING_FOLDER)
@click.option(
    "--prompts", required=True, type=EXISTING_FILE, help="A text file, one user message per line."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=96, show_default=True)
@JSON
def answers(
    base: str, trained: tuple[Path, ...], prompts: Path, max_new_tokens: int, as_json: bool
) -> None:
    """Show greedy generations of BASE and of each TRAINED, side by side.

    BASE is a model's name or folder; TRAINED the output folder of a run on it (a LoRA adapter, or
    a full fine-tune), or the model that an adapter was merged into. An adapter is shown on the base
    as it was trained, quantised too.
    """
    from rich.table import Table
    from transformers.utils import logging

    questions = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not questions:
        raise click.ClickException(f"{prompts} has no prompt: put one user message on each line")
    logging.disable_progress_bar()
    with no_side_effects():
        check_model_name(base, f"BASE {base}")
        tokenizers = [load_trained_tokenizer(base, folder) for folder in trained]
        tokenizer = load_tokenizer(base, tokenizers[0].chat_template)
        said = {"Before": generate(load_model(base), tokenizer, questions, max_new_tokens)}
        for (folder, name), tokenizer in zip(named(trained), tokenizers, strict=True):
            heading = "After" if len(trained) == 1 else name
            model = load_trained(base, folder)
            said[heading] = generate(model, tokenizer, questions, max_new_tokens)
    if as_json:
        click.echo(json.dumps({"Prompt": questions, **said}, indent=1, ensure_ascii=False))
        return
    table = Table(show_lines=True)
    for heading in ("Prompt", *said):
        table.add_column(cell(heading), ratio=1, overflow="fold")
    for row in zip(questions, *said.values(), strict=True):
        table.add_row(*map(cell, row))
    console(max(120, 40 * (1 + len(said)))).print(table)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    max_new_tokens: int,
) -> list[str]:
    """Returns the greedy response to each question, decoded without special tokens."""
    answers = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
        answer = output[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers
