"""`bdpo recipes publish`: uploads the model, the model card and the bundle of a run to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.cli.options import EXISTING_FOLDER
from bdpo_plugin.cli.recipes.check import tell
from bdpo_plugin.output.card_facts import is_local
from bdpo_plugin.private_text import private_in, secret_in
from bdpo_plugin.recipes.hub import asking
from bdpo_plugin.recipes.recipe_file import read_recipe
from bdpo_plugin.recipes.run_numbers import read_record
from bdpo_plugin.recipes.shareable import Finding, findings, private_findings
from bdpo_plugin.redact import place_words, redacted
from bdpo_plugin.settings import RECIPE, BDPOSettings

#: Files of an output folder that are uploaded, beside the weights and the bundle.
_FILES = re.compile(
    r"README\.md|adapter_config\.json|config\.json|generation_config\.json|chat_template\.\w+|"
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|"
    r"curves\.png|mi_scatter\.png"
)
_BUNDLE = "recipe"
#: Tokenizer files that contain only the vocabulary, so nothing of the user's.
_VOCABULARY = re.compile(r"tokenizer\.model|vocab\.\w+|merges\.txt")
#: Files that are checked line by line: prose and templates.
_TEXTS = (".md", ".txt", ".jinja")
#: Data files, which `bdpo recipes bundle --with-texts` copies.
_DATA = (".jsonl", ".csv")
#: The YAML block of a model card that this package writes.
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Maximum number of findings shown for one data file.
_SHOWN = 5


@click.command()
@click.argument("run_dir", type=EXISTING_FOLDER)
@click.option("--repo", metavar="NAMESPACE/NAME", help="Of the hub; needed to upload.")
@click.option("--push", is_flag=True, help="Upload. Without it, only say what would be.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.pass_context
def publish(
    context: click.Context, run_dir: Path, repo: str | None, push: bool, private: bool
) -> None:
    """Upload the model, the card and the bundle of RUN_DIR to the hub, by your own login.

    First `bdpo recipes bundle RUN_DIR`. Without --push nothing leaves this machine: the model card
    is completed, what would be uploaded is listed, and all of it that is text is looked through for
    secrets, addresses and paths. No checkpoint, log or optimizer is uploaded.
    """
    if not (run_dir / _BUNDLE / "recipe.yml").is_file():
        raise click.ClickException(
            f"{run_dir} has no {_BUNDLE}/: make it by `bdpo recipes bundle {run_dir}`"
        )
    _complete_card(run_dir, repo)
    files = sorted(wanted(run_dir))
    for file in files:
        click.echo(f"{file.stat().st_size:>14,}  {file.relative_to(run_dir).as_posix()}")
    found = list(_findings(run_dir, files))
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
    """Yields the files that are uploaded: those that the model needs, and those of the bundle."""
    adapter = (run_dir / "adapter_config.json").is_file()
    # Axolotl leaves the base model's weights beside an adapter
    weights = re.compile(("adapter_model" if adapter else "model") + r".*\.(safetensors|json|bin)")
    for path in run_dir.iterdir():
        if path.is_file() and (_FILES.fullmatch(path.name) or weights.fullmatch(path.name)):
            yield path
    yield from (path for path in (run_dir / _BUNDLE).iterdir() if path.is_file())


def _complete_card(run_dir: Path, repo: str | None) -> None:
    """Adds the bundle's pictures and recipe to the model card, and the name of its repository.

    The host wrote the card before they existed."""
    from bdpo_plugin.output.model_card import complete_card

    for picture in (run_dir / _BUNDLE).glob("*.png"):
        (run_dir / picture.name).write_bytes(picture.read_bytes())
    record = read_record(run_dir)
    settings = BDPOSettings.from_keys(record["settings"])
    bundle = run_dir / _BUNDLE / "recipe.yml"
    recipe = read_recipe(bundle, str(bundle))
    cite = record["host"] == "llamafactory"
    configuration = {**recipe.config, RECIPE: recipe.about}
    complete_card(run_dir, settings, configuration=configuration, cite=cite, repo=repo)


def _findings(run_dir: Path, files: list[Path]) -> Iterator[Finding]:
    """Yields what must not be shared in the files that would be uploaded, and what they lack."""
    if "licence" not in read_recipe(run_dir / _BUNDLE / "recipe.yml", _BUNDLE).about:
        what = f"the card names no licence: write `licence` into `{RECIPE}`"
        yield Finding(False, f"{_BUNDLE}/recipe.yml", what)
    for file in files:
        name = file.relative_to(run_dir).as_posix()
        if _VOCABULARY.fullmatch(file.name):
            continue
        if file.suffix in (".yml", ".yaml"):
            yield from findings(read_recipe(file, name), complete=False)
        elif file.suffix == ".json":
            yield from _of_json(file, name)
        elif file.suffix in _TEXTS:
            yield from _of_text(file, name)
        elif file.suffix in _DATA:
            yield from _of_data(file, name)


def _of_json(file: Path, name: str) -> Iterator[Finding]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield Finding(True, name, f"is no JSON: {error}")
        return
    if file.name == "tokenizer.json":
        content = {k: v for k, v in content.items() if k not in ("model", "added_tokens")}
    if file.name == "adapter_config.json":
        base = str(content.get("base_model_name_or_path"))
        if is_local(base):
            yield Finding(
                False,
                name,
                f"names the base model by a path, {base}, which nobody else has: write its name on "
                f"the hub there, and as `base_model` into `{RECIPE}` of {_BUNDLE}/recipe.yml",
            )
    for place, why, _ in redacted(content)[1]:
        yield Finding(True, f"{name}, `{place_words(place)}`", f"{why}: change it there")


def _of_text(file: Path, name: str) -> Iterator[Finding]:
    """Yields what must not be shared in a text file, line by line. YAML blocks are parsed."""
    text = file.read_text(encoding="utf-8")
    for block in _YAML.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for wrong, where, what in private_findings(block[1]):
            yield Finding(wrong, f"{name}, from line {first + 1}: {where}", what)
    rest = _YAML.sub(lambda block: "\n" * block[0].count("\n"), text)
    for number, line in enumerate(rest.split("\n"), 1):
        if (why := private_in(line)) is not None:
            yield Finding(True, f"{name}, line {number}", f"{why}: change it there")


def _of_data(file: Path, name: str) -> Iterator[Finding]:
    """Yields lines of a data file that may have a secret.

    These are warnings only, as the user asked to share the pairs as they are."""
    told = 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if told < _SHOWN and (why := secret_in(line)) is not None:
                told += 1
                yield Finding(False, f"{name}, line {number}", why)
