"""`bdpo recipes bundle`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from bdpo_plugin.cli.recipes.check import tell
from bdpo_plugin.cli.recipes.facts import (
    expected_of,
    measured_of,
    quantiles,
    read_record,
    recipe_of,
)
from bdpo_plugin.cli.recipes.files import Recipe, read_recipe
from bdpo_plugin.cli.recipes.sharing import findings, is_local
from bdpo_plugin.cli.runs import Run, load_figures, read_run
from bdpo_plugin.settings import PREFIX

_SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to make.  [default: recipe in RUN_DIR]",
)
@click.option("--with-texts", is_flag=True, help="Copy the data files too, prompts and answers.")
def bundle(run_dir: Path, to: Path | None, with_texts: bool) -> None:
    """Make one folder of what others need to run RUN_DIR again, and to see that it is the same.

    recipe.yml (relative paths, and the numbers to expect), run.json (versions, hardware, null
    prompt, hashes), scores.parquet and mi.json, log.json, pictures. No prompt and no answer is in
    it unless asked. `bdpo recipes check FOLDER --run` compares.
    """
    folder = to or run_dir / "recipe"
    if folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"{folder} is there already: name another --to, or remove it")
    record = read_record(run_dir)
    recipe = recipe_of(run_dir)
    text, moved = relative(recipe)
    about = about_of(recipe, run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = Recipe(recipe.name, recipe.path, text, recipe.config, about)
    (folder / "recipe.yml").write_text(written.with_about(about), encoding="utf-8")
    _write(folder / "run.json", record)
    run = read_run(run_dir, run_dir.resolve().name)
    _write(folder / "log.json", run.log)
    if run.scores is not None:
        _write_scores(run.scores, folder)
    _draw(run, folder)
    if with_texts:
        for file in data_files(recipe):
            shutil.copyfile(file, folder / file.name)
    for before, after in moved.items():
        click.echo(f"{before} became {after}")
    click.echo(f"Wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
    tell(list(findings(read_recipe(folder / "recipe.yml", str(folder)))))


def about_of(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """The mapping `bdpo_recipe` of a run's configuration, with what came of it."""
    record = read_record(run_dir)
    batch = record["batch"]
    return {
        "title": f"B-DPO, {recipe.method}, {Path(recipe.model).name}",
        **recipe.about,
        "processes": batch["processes"],
        "batch": batch["effective"],
        "measured": measured_of(run_dir),
        "versions": record["versions"],
        "expected": expected_of(run_dir),
    }


def relative(recipe: Recipe) -> tuple[str, dict[str, str]]:
    """The text of a recipe with relative paths for absolute ones; and which became which.

    One below the present folder keeps its way from there; any other keeps its name alone.
    """
    text, moved = recipe.text, {}
    for value in sorted(set(_texts(recipe.config)), key=len, reverse=True):
        path = Path(value).expanduser()
        if not path.is_absolute() or "\n" in value:
            continue
        here = Path.cwd()
        inside = path.relative_to(here) if path.is_relative_to(here) else Path(path.name)
        moved[value] = f"./{inside.as_posix()}"
        text = text.replace(value, moved[value])
    return text, moved


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def data_files(recipe: Recipe) -> list[Path]:
    """The files of pairs on this machine that a recipe names."""
    config = recipe.config
    if recipe.host == "axolotl":
        entries = [*(config.get("datasets") or []), *(config.get("test_datasets") or [])]
        paths = [Path(str(entry.get("path"))) for entry in entries]
    else:
        folder = Path(str(config.get("dataset_dir", "data")))
        known = folder / "dataset_info.json"
        info = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        named = ",".join(str(config.get(key) or "") for key in ("dataset", "eval_dataset"))
        names = [name.strip() for name in named.split(",")]
        paths = [folder / info[name].get("file_name", "") for name in names if name in info]
    return [path for path in paths if is_local(str(path)) and path.is_file()]


def _write_scores(scores: Any, folder: Path) -> None:
    import pyarrow.parquet as pq

    if "control_group" in scores.column_names:  # values of a column of the user's
        scores = scores.drop_columns(["control_group"])
    pq.write_table(scores, folder / "scores.parquet")
    names = ("mi_chosen", "mi_rejected", "weight_chosen", "weight_rejected", "scale")
    table = {name: quantiles(scores[name].to_pylist(), _SHARES) for name in names}
    metadata = {key.decode(): value.decode() for key, value in scores.schema.metadata.items()}
    known = {k: v for k, v in metadata.items() if k.startswith(PREFIX) or k == "mi_unit"}
    _write(folder / "mi.json", {"shares": list(_SHARES), **table, "settings": known})


def _draw(run: Run, folder: Path) -> None:
    """The pictures of `bdpo plot`, where they can be drawn here."""
    try:
        figures = load_figures()
    except click.ClickException as error:
        click.echo(f"No pictures: {error.message}")
        return
    figures.curves([run], folder / "curves.png")
    if run.scores is not None:
        figures.mi_scatter([(run.name, run.scores)], folder / "mi_scatter.png")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
