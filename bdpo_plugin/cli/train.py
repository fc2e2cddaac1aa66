"""`bdpo train`: trains with TRL by a YAML file, as `trl dpo` does, but with B-DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bdpo_plugin.cli.options import EXISTING_FILE
from bdpo_plugin.recipes.host_config import HOSTS, check_installed, check_model, read_config


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=EXISTING_FILE)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def train(config: Path, options: tuple[str, ...]) -> None:
    """Train with TRL's DPO trainer and B-DPO, by the YAML file CONFIG.

    Its keys are those of `trl dpo` and those of B-DPO; OPTIONS override them, as in
    `bdpo train CONFIG --beta 0.2 --bdpo_alpha 0`. The data is `datasets`, or `dataset_name`, which
    may also be a file of pairs. `bdpo recipes list` has examples to copy.
    """
    from bdpo_plugin.settings import BDPOError

    found = read_config(config)
    if found.host == "llamafactory" and "stage" not in found.keys:
        raise click.ClickException(
            f"{config} names no data: set `dataset_name`, a data set of the hub or a file of "
            "pairs, or `datasets`, a list of them"
        )
    if found.host != "trl":
        other = HOSTS[found.host].command
        raise click.ClickException(
            f"{config} is a configuration of another host: call `{other} {config}`. One of TRL has "
            "`model_name_or_path`, and `dataset_name` or `datasets`"
        )
    check_installed(found.host)
    check_model(found.host, found.keys)
    try:
        run(found.keys, options)
    except BDPOError as error:
        raise click.ClickException(f"{config}: {error}") from error


def run(keys: dict[str, Any], options: tuple[str, ...]) -> None:
    """Trains, and saves what `trl dpo` saves, the log and a model card.

    Args:
        keys: the contents of the YAML file.
        options: options of the command line, which override it.

    Raises:
        BDPOError: the configuration or its data cannot be trained on.
    """
    from bdpo_plugin.hosts.trl.arguments import parse
    from bdpo_plugin.hosts.trl.loading import load_data, make_trainer
    from bdpo_plugin.hosts.trl.side_effects import for_sharing
    from bdpo_plugin.settings import RECIPE

    arguments = parse(keys, options)
    training, name = arguments.training, arguments.script.dataset_name
    trainer = make_trainer(arguments, load_data(arguments))
    about = {RECIPE: keys[RECIPE]} if RECIPE in keys else {}
    trainer.configuration = for_sharing({**arguments.keys, **about})
    resumed = {"true": True, "false": None}
    value = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resumed.get(str(value).lower(), value))
    trainer.save_model(training.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=name)
    trainer.accelerator.print(f"Saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=name)
    if hasattr(trainer, "end"):  # from transformers 5.18: ends the trackers and the process group
        trainer.end()
