"""`bdpo doctor`: checks an environment and a configuration before a run."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdpo_plugin.cli.no_side_effects import no_side_effects, silence
from bdpo_plugin.cli.options import EXISTING_FILE, JSON, cell, console
from bdpo_plugin.hosts import part
from bdpo_plugin.inspection.findings import FAILED, OK, WARNING, Finding, fix_in
from bdpo_plugin.recipes.host_config import (
    Config,
    check_installed,
    check_model,
    check_preference,
    read_config,
)
from bdpo_plugin.redact import REDACTED, is_secret
from bdpo_plugin.settings import RECIPE
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    from bdpo_plugin.inspection.configuration import Inspected

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "not known": "dim"}
#: The key by which a configuration of each host asks for B-DPO, and the lines that do.
_OURS = {
    "axolotl": ("rl", "rl: bdpo"),
    "llamafactory": ("pref_loss", "stage: dpo\npref_loss: bdpo"),
}


@click.command()
@click.argument("config", required=False, type=EXISTING_FILE)
@JSON
def doctor(config: Path | None, as_json: bool) -> None:
    """Look at this environment, and at what CONFIG would do in it, without loading any weights.

    CONFIG is a YAML of Axolotl, LLaMA-Factory or `bdpo train`: its keys, its data and the first
    three rows as the model would read them, the null prompt, and the memory that a run would take.
    Beside what should change is a fix that can be copied. Ends with 1 where something would keep a
    run from training B-DPO.
    """
    found = read_config(config) if config else None
    hide = hider(found.keys if found else {})
    with no_side_effects():
        findings, rows = _looked_at(config, found)
    findings = [f._replace(words=hide(f.words), fix=hide(f.fix)) for f in findings]
    rows = [{name: hide(text) for name, text in row.items()} for row in rows]
    if as_json:
        told = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"findings": told, "rows": rows}, indent=1))
    else:
        _show(findings, rows)
    if any(finding.state == "failed" for finding in findings):
        raise SystemExit(1)


def _looked_at(
    path: Path | None, config: Config | None
) -> tuple[list[Finding], list[dict[str, str]]]:
    from bdpo_plugin.cli.environment import environment, needs

    rows: list[dict[str, str]] = []
    with silence():
        findings = list(environment())
        if path and config:
            findings += needs(config, {finding.name: finding for finding in findings})
            for found in _configuration(path, config):
                (findings if isinstance(found, Finding) else rows).append(found)  # type: ignore[arg-type]
    return findings, rows


def _configuration(path: Path, config: Config) -> Iterator[Finding | dict[str, str]]:
    """Yields the findings about a configuration, and its first rows as dictionaries of texts."""
    from bdpo_plugin.cli.environment import words_of
    from bdpo_plugin.inspection.configuration import SHOWN
    from bdpo_plugin.inspection.data_findings import data_findings
    from bdpo_plugin.inspection.run_findings import run_findings
    from bdpo_plugin.inspection.text_findings import find_null, text_findings

    if config.host != "trl":  # `bdpo train` trains nothing else
        key, ours = _OURS[config.host]
        try:
            check_preference(path, config)
        except click.ClickException as error:
            yield Finding("keys", FAILED, error.message, ours)
            return
        if config.keys.get(key) != "bdpo":
            yield Finding("keys", WARNING, f"this is no B-DPO run: it has not `{key}: bdpo`", ours)
    try:
        check_installed(config.host)
        check_model(config.host, config.keys)
        if problems := _trl_problems(config):
            for problem in problems:
                yield Finding("configuration", FAILED, problem, fix_in(problem, config.keys))
            return
        data = _inspect(path, config)
    except click.ClickException as error:
        yield Finding("configuration", FAILED, error.message)
        return
    except Exception as error:  # a host can raise anything at a configuration or its data
        words = str(error) or words_of(error)
        yield Finding("configuration", FAILED, words, fix_in(words, config.keys))
        return
    if config.host == "axolotl":
        yield from _without_effect(config)
    yield Finding("configuration", OK, "the host takes it, and its data")
    yield from data_findings(data)
    null = find_null(data)
    yield from text_findings(data, null)
    yield from run_findings(data, null)
    decode = data.tokenizer.decode
    for pair in data.first or data.pairs[:SHOWN]:
        yield {
            "prompt": decode(pair.chosen.prompt_ids),
            "chosen": decode(pair.chosen.completion_ids),
            "rejected": decode(pair.rejected.completion_ids),
        }


def _trl_problems(config: Config) -> list[str]:
    """Returns all that `bdpo train` refuses in the keys of a configuration."""
    if config.host != "trl":
        return []
    keys = {key: value for key, value in config.keys.items() if key != RECIPE}
    return list(part("trl", "recipe_validation").problems(keys))


def _inspect(path: Path, config: Config) -> Inspected:
    inspection = part(config.host, "inspection")
    found: Inspected = inspection.inspect(path if config.host == "llamafactory" else config.keys)
    return found


def _without_effect(config: Config) -> Iterator[Finding]:
    from bdpo_plugin.hosts.axolotl.schema import without_effect

    for each in without_effect(config.keys):
        near = difflib.get_close_matches(str(each.path[-1]), each.known, n=1)
        fix = f"{near[0]}: {each.value}  # in place of {each.place}" if near else ""
        words = f"Axolotl knows no `{each.place}`, and drops it silently"
        yield Finding("keys", WARNING, words, fix or f"# without {each.place}")


# What is shown --------------------------------------------------------------------------------


def hider(keys: Mapping[str, Any]) -> Callable[[str], str]:
    """Returns a function that removes secrets from a text: those of the environment and those of a
    configuration."""
    entries = [*os.environ.items(), *_entries(keys)]
    secrets = {v for k, v in entries if is_secret(str(k), v) and len(v) >= 8}

    def hide(text: str) -> str:
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, REDACTED)
        return re.sub(r"[\w-]{19,}", lambda m: REDACTED if is_secret("", m[0]) else m[0], text)

    return hide


def _entries(value: Any, key: Any = "") -> Iterator[tuple[Any, Any]]:
    """Yields all values in nested mappings and lists, with their keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _entries(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, key)
    else:
        yield key, value


def _show(findings: Sequence[Finding], rows: Sequence[dict[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console(120)
    width = max(len(finding.name) for finding in findings)
    for name, state, words, fix in findings:
        line = Table.grid(padding=(0, 2))
        line.add_column(width=width, no_wrap=True)
        line.add_column(width=max(map(len, _COLOURS)), no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(name, cell(state, _COLOURS[state]), cell(words))
        screen.print(line)
        if fix:  # whole lines, which can be copied into the file or the shell as they are
            lines = f"# {fix}" if fix[0].isupper() else fix
            screen.print(Text(f"# fix:\n{visible(lines)}", style="bold cyan"), soft_wrap=True)
    if not rows:
        return
    table = Table(
        title="\nThe first rows of the data as the model reads them, the response in ⟦ ⟧",
        title_justify="left",
        show_lines=True,
    )
    for side in ("chosen", "rejected"):
        table.add_column(side, ratio=1, overflow="fold")
    for row in rows:
        cells = [cell(row["prompt"]) for _ in range(2)]
        for text, side in zip(cells, ("chosen", "rejected"), strict=True):
            text.append(f"⟦{visible(row[side])}⟧", style="bold green")
        table.add_row(*cells)
    screen.print(table)
