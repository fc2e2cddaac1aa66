"""`bdpo recipes publish`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click

from bdpo_plugin.cli.recipes.check import tell
from bdpo_plugin.cli.recipes.facts import read_record
from bdpo_plugin.cli.recipes.files import read_recipe
from bdpo_plugin.cli.recipes.hub import asking
from bdpo_plugin.cli.recipes.sharing import Finding, findings
from bdpo_plugin.settings import BDPOSettings
from bdpo_plugin.shareable import without_secrets

#: What is uploaded of an output folder, beside the weights and the bundle.
_FILES = re.compile(
    r"README\.md|adapter_config\.json|config\.json|generation_config\.json|chat_template\.\w+|"
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|"
    r"curves\.png|mi_scatter\.png"
)
_BUNDLE = "recipe"
_PATH = re.compile(r"(?<![\w:/.])(?:/home|/root|/Users|/mnt|/data|/workspace|/tmp)/[\w./-]+")


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repo", metavar="NAMESPACE/NAME", help="Of the hub; needed to upload.")
@click.option("--push", is_flag=True, help="Upload. Without it, only say what would be.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.pass_context
def publish(
    context: click.Context, run_dir: Path, repo: str | None, push: bool, private: bool
) -> None:
    """Upload the model, the card and the bundle of RUN_DIR to the hub, by your own login.

    First `bdpo recipes bundle RUN_DIR`. Without --push nothing leaves this machine: the model card
    is completed, and what would be uploaded is listed. No checkpoint, log or optimizer is.
    """
    if not (run_dir / _BUNDLE / "recipe.yml").is_file():
        raise click.ClickException(
            f"{run_dir} has no {_BUNDLE}/: make it by `bdpo recipes bundle {run_dir}`"
        )
    _complete_card(run_dir)
    files = sorted(wanted(run_dir))
    for file in files:
        click.echo(f"{file.stat().st_size:>14,}  {file.relative_to(run_dir).as_posix()}")
    found = list(_findings(run_dir))
    tell(found)
    if any(finding.wrong for finding in found):
        raise click.ClickException("nothing was uploaded")
    if not push:
        click.echo("Nothing was uploaded: --repo NAMESPACE/NAME --push does it")
        return
    if repo is None:
        raise click.UsageError("--push needs --repo NAMESPACE/NAME")
    names = [file.relative_to(run_dir).as_posix() for file in files]
    with asking("the hub did not take it") as hub:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        done = hub.upload_folder(repo_id=repo, folder_path=run_dir, allow_patterns=names)
    click.echo(f"Uploaded {len(files)} files to {repo}: {done.commit_url}")


def wanted(run_dir: Path) -> Iterator[Path]:
    """The files of a run that its model needs, and the bundle's."""
    adapter = (run_dir / "adapter_config.json").is_file()
    # Axolotl leaves the base model's weights beside an adapter
    weights = re.compile(("adapter_model" if adapter else "model") + r".*\.(safetensors|json|bin)")
    for path in run_dir.iterdir():
        if path.is_file() and (_FILES.fullmatch(path.name) or weights.fullmatch(path.name)):
            yield path
    yield from (path for path in (run_dir / _BUNDLE).iterdir() if path.is_file())


def _complete_card(run_dir: Path) -> None:
    """The card with the pictures and the recipe of the bundle, for the host has written it before
    there were any."""
    from bdpo_plugin.run.card import complete_card

    for picture in (run_dir / _BUNDLE).glob("*.png"):
        (run_dir / picture.name).write_bytes(picture.read_bytes())
    record = read_record(run_dir)
    settings = BDPOSettings.from_keys(record["settings"])
    recipe = run_dir / _BUNDLE / "recipe.yml"
    cite = record["host"] == "llamafactory"
    complete_card(run_dir, settings, recipe=recipe, cite=cite)


def _findings(run_dir: Path) -> Iterator[Finding]:
    bundle = run_dir / _BUNDLE / "recipe.yml"
    yield from findings(read_recipe(bundle, str(bundle)))
    card = (run_dir / "README.md").read_text(encoding="utf-8")
    for number, line in enumerate(card.split("\n"), 1):
        if without_secrets(line) != line:
            yield Finding(True, f"README.md, line {number}", "has what looks like a token or a key")
        if found := _PATH.search(line):
            yield Finding(
                True, f"README.md, line {number}", f"names a path of this machine, {found[0]}"
            )
    file = run_dir / "adapter_config.json"
    if file.is_file():
        base = str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path"))
        if Path(base).is_absolute() or base.startswith("."):
            what = f"names the base model by a path, {base}: nobody else can load the adapter"
            yield Finding(False, "adapter_config.json", what)
