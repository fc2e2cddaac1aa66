"""`bdpo recipes bundle`: collects what others need to repeat a run, without private details."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.cli.options import EXISTING_FOLDER, FOLDER
from bdpo_plugin.cli.plot import load_figures
from bdpo_plugin.cli.recipes.check import tell
from bdpo_plugin.hosts import part
from bdpo_plugin.output.run_folder import Run, read_run
from bdpo_plugin.recipes.recipe_file import Recipe
from bdpo_plugin.recipes.run_numbers import (
    expected_of,
    measured_of,
    read_record,
    recipe_of,
    rounded_quantiles,
)
from bdpo_plugin.recipes.shareable import findings, local_data
from bdpo_plugin.redact import (
    REDACTED,
    Change,
    configuration_text,
    digest_of,
    place_words,
    redacted,
    without_texts,
)
from bdpo_plugin.settings import PREFIX, RECIPE
from bdpo_plugin.terminal import visible

_SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@click.command()
@click.argument("run_dir", type=EXISTING_FOLDER)
@click.option("--to", type=FOLDER, help="The folder to make.  [default: recipe in RUN_DIR]")
@click.option(
    "--with-texts",
    is_flag=True,
    help="With the null prompt, the system prompt, the chat template and the data files.",
)
def bundle(run_dir: Path, to: Path | None, with_texts: bool) -> None:
    """Make one folder of what others need to run RUN_DIR again, and to see that it is the same.

    recipe.yml (relative paths, and the numbers to expect), run.json (versions, hardware, hashes),
    scores.parquet and mi.json, log.json, pictures. No prompt, template or answer is in it unless
    asked: digests stand in their places. `bdpo recipes check FOLDER --run` compares.

    Exit status 1, and no folder: something in it must not be shared.
    """
    folder = to or run_dir / "recipe"
    if folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"{folder} is there already: name another --to, or remove it")
    record = shared_record(run_dir, texts=with_texts)
    recipe, changes = shared_recipe(run_dir, texts=with_texts)
    run = read_run(run_dir, run_dir.resolve().name)
    for change in changes:
        click.echo(visible(f"{place_words(change.place)} {change.why}: it became {change.became}"))
    found = list(findings(recipe, complete=False))
    tell(found)
    if any(finding.wrong for finding in found):
        raise click.ClickException(
            f"nothing was bundled. Mend it in {run_dir / 'bdpo' / 'recipe.yml'}, which is the "
            "configuration of this run as others will see it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as name:
        made = Path(name, folder.name)
        made.mkdir()
        (made / "recipe.yml").write_text(recipe.text, encoding="utf-8")
        _write(made / "run.json", record)
        _write(made / "log.json", redacted(run.log)[0])
        if run.scores is not None:
            _write_scores(run.scores, made, texts=with_texts)
        _draw(run, made)
        if with_texts:
            _copy_data(recipe, made)
        made.replace(folder)  # `folder` is absent or empty
    click.echo(f"Wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


def shared_recipe(run_dir: Path, *, texts: bool) -> tuple[Recipe, list[Change]]:
    """Returns the redacted recipe of a run, and the changes made by the redaction.

    Args:
        run_dir: the output folder of the run.
        texts: whether to keep prompts and templates. If not, their digests replace them.
    """
    recipe = recipe_of(run_dir)
    config, changes = redacted(part(recipe.host, "side_effects").for_sharing(recipe.config))
    if not texts:
        config = without_texts(config)
    about, more = redacted(about_of(recipe, run_dir, texts=texts))
    about = _without_redacted(about)  # training ignores this mapping, so it needs no placeholders
    changes += [Change((RECIPE, *change.place), *change[1:]) for change in more]
    made = Recipe(recipe.name, recipe.path, configuration_text(config), config, about)
    return Recipe(recipe.name, recipe.path, made.with_about(about), config, about), changes


def _without_redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_redacted(v) for k, v in value.items() if v != REDACTED}
    if isinstance(value, list):
        return [_without_redacted(each) for each in value if each != REDACTED]
    return value


def shared_record(run_dir: Path, *, texts: bool) -> dict[str, Any]:
    """Returns the redacted record of a run: versions, hardware, settings and digests.

    Args:
        run_dir: the output folder of the run.
        texts: whether to keep prompts and templates. If not, their digests replace them.
    """
    record: dict[str, Any] = redacted(read_record(run_dir))[0]
    if texts:
        return record
    text = read_record(run_dir)["null_prompt"]["text"]
    record["settings"] = without_texts(record["settings"])
    record["null_prompt"] = {"digest": digest_of(text), "source": record["null_prompt"]["source"]}
    return record


def about_of(recipe: Recipe, run_dir: Path, *, texts: bool = False) -> dict[str, Any]:
    """Returns the mapping `bdpo_recipe` of a run's configuration, with the results of the run."""
    record = read_record(run_dir)
    batch = record["batch"]
    title = f"B-DPO, {recipe.method}, {Path(recipe.model).name}"
    about = _without_redacted(recipe.about)
    return {
        "title": title,
        **about,
        "processes": batch["processes"],
        "batch": batch["effective"],
        "measured": measured_of(run_dir),
        "versions": record["versions"],
        "expected": expected_of(run_dir, texts=texts),
    }


def _copy_data(recipe: Recipe, folder: Path) -> None:
    """Copies the local data files of a recipe. Their paths are relative to the current folder."""
    for path in map(Path, local_data(recipe)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
        else:
            click.echo(f"{path} was not copied: there is no such file below the present folder")


def _write_scores(scores: Any, folder: Path, *, texts: bool) -> None:
    import pyarrow.parquet as pq

    if "control_group" in scores.column_names:  # it has values from a column of the user's data
        scores = scores.drop_columns(["control_group"])
    metadata = {key.decode(): value.decode() for key, value in scores.schema.metadata.items()}
    known = {k: v for k, v in metadata.items() if k.startswith(PREFIX) or k == "mi_unit"}
    known = _shared_metadata(known, texts=texts)
    pq.write_table(scores.replace_schema_metadata(known), folder / "scores.parquet")
    names = ("mi_chosen", "mi_rejected", "weight_chosen", "weight_rejected", "scale")
    table = {
        name: rounded_quantiles(scores[name].to_pylist(), _SHARES)
        for name in names
        if name in scores.column_names
    }
    _write(folder / "mi.json", {"shares": list(_SHARES), **table, "settings": known})


def _shared_metadata(metadata: Mapping[str, str], *, texts: bool) -> dict[str, str]:
    shown: dict[str, str] = redacted(metadata)[0]
    if shown.get("bdpo_null_prompt") == "None":  # not a text, so no digest replaces it
        return shown
    return shown if texts else without_texts(shown)


def _draw(run: Run, folder: Path) -> None:
    """Draws the pictures of `bdpo plot`, if matplotlib is installed."""
    try:
        figures = load_figures()
    except click.ClickException as error:
        click.echo(f"No pictures: {error.message}")
        return
    from bdpo_plugin.cli.training_curves import curves

    curves([run], folder / "curves.png")
    if run.measured:
        figures.mi_scatter([(run.name, run.scores)], folder / "mi_scatter.png")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
