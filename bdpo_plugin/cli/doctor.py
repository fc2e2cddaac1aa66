"""`bdpo doctor`: checks an environment and a configuration before a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdpo_plugin import __version__
from bdpo_plugin.cli.looking import looking
from bdpo_plugin.recipes.host_config import Config, check_model, check_preference, read_config
from bdpo_plugin.redact import LEFT_OUT, is_secret
from bdpo_plugin.terminal import visible

if TYPE_CHECKING:
    from bdpo_plugin.inspection.data_findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "not known": "dim"}
#: The number of dataset rows that are shown.
_SHOWN = 3


@click.command()
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and no table.")
def doctor(config: Path | None, as_json: bool) -> None:
    """Look at this environment, and at what CONFIG would do in it, without loading any weights.

    CONFIG is a YAML of Axolotl or LLaMA-Factory: its keys, its data and three rows of it as the
    model would read them, the null prompt, and the memory that a run would take. Of a YAML of
    `bdpo train` only the keys and the model are looked at. Ends with 1 where
    something would keep a run from training B-DPO.
    """
    found = read_config(config) if config else None
    hide = hider(found.keys if found else {})
    with looking():
        findings, rows = _looked_at(config, found)
    findings = [f._replace(words=hide(f.words)) for f in findings]
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
    from bdpo_plugin.inspection.data_findings import Finding

    findings: list[Finding] = []
    rows: list[dict[str, str]] = []
    with _quiet():
        findings += environment()
        if path and config:
            findings += _needs(config, {finding.name: finding for finding in findings})
            for part in _configuration(path, config):
                (findings if isinstance(part, Finding) else rows).append(part)  # type: ignore[arg-type]
    return findings, rows


# The environment ------------------------------------------------------------------------------


def environment() -> Iterator[Finding]:
    """Yields what is installed, whether B-DPO is active, and which hardware there is."""
    from bdpo_plugin.inspection.data_findings import FAILED, OK, UNKNOWN, WARNING, Finding

    yield Finding("bdpo-plugin", OK, f"{__version__}, Python {sys.version.split()[0]}")
    on, why = _entry_point()
    hosts = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}
    for package, name in hosts.items():
        if (release := _version(package)) is None:
            yield Finding(name, UNKNOWN, "not installed")
            continue
        if package == "trl" and _version("llamafactory"):
            yield Finding(name, OK, f"{release}, as LLaMA-Factory wants it")
            continue
        try:
            tested = _tested(package)
        except Exception as error:  # a broken installation can raise anything
            yield Finding(name, FAILED, f"{release} cannot be imported: {_words(error)}")
            continue
        if release in tested:
            yield Finding(name, OK, f"{release}, which is tested")
        else:
            state = FAILED if package == "llamafactory" else WARNING
            verdict = "refused" if package == "llamafactory" else "not tested"
            words = f"{release} is {verdict}; tested: {', '.join(tested)}"
            yield Finding(name, state, words)
    yield Finding("entry point", OK if on else WARNING, why)
    if _version("axolotl"):
        yield _plugin(on)
    if _version("llamafactory"):
        state, words = (OK, "`pref_loss: bdpo` works")
        if not on:
            state, words = FAILED, "`pref_loss: bdpo` is not known: the entry point is its only way"
        yield Finding("key in LLaMA-Factory", state, words)
    yield from _machine()


def _tested(package: str) -> Sequence[str]:
    if package == "axolotl":
        from bdpo_plugin.hosts.axolotl.rewrite_config import TESTED as OF_AXOLOTL

        return OF_AXOLOTL
    if package == "llamafactory":
        from bdpo_plugin.hosts.llamafactory.arguments import TESTED as OF_LLAMAFACTORY

        return OF_LLAMAFACTORY
    from bdpo_plugin.hosts.trl.limits import TESTED as OF_TRL

    return OF_TRL


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def _entry_point() -> tuple[bool, str]:
    """Whether PyTorch calls our entry point when it is imported, and the reason."""
    for name, value in (
        ("BDPO_AUTOLOAD", os.environ.get("BDPO_AUTOLOAD")),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")),
    ):
        if value == "0":
            return False, f"off: the environment variable {name} is 0"
    ours = [e for e in entry_points(group="torch.backends") if e.name == "bdpo_plugin"]
    if not ours:
        return False, "not installed: reinstall bdpo-plugin in this environment (pip install)"
    return True, f"active: {ours[0].value}"


def _plugin(on: bool) -> Finding:
    from bdpo_plugin.inspection.data_findings import FAILED, OK, WARNING, Finding

    try:
        import bdpo_plugin.hosts.axolotl.plugin
        import bdpo_plugin.hosts.axolotl.trainer  # noqa: F401
    except Exception as error:  # a broken installation can raise anything
        return Finding("key in Axolotl", FAILED, f"the plugin is not importable: {_words(error)}")
    if on:
        return Finding("key in Axolotl", OK, "`rl: bdpo` works, with `plugins:` and without")
    words = "`rl: bdpo` works only with `plugins: [bdpo_plugin.BDPOPlugin]`"
    return Finding("key in Axolotl", WARNING, words)


def _machine() -> Iterator[Finding]:
    import torch

    from bdpo_plugin.inspection.data_findings import OK, UNKNOWN, Finding

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            words = f"{of.name}, {of.total_memory / 2**30:.0f} GiB, sm_{of.major}{of.minor}"
            words += ", bfloat16" if torch.cuda.is_bf16_supported() else ", no bfloat16"
            yield Finding("GPU", OK, words)
    else:
        yield Finding("GPU", UNKNOWN, f"none that torch {torch.__version__} can use: the CPU")
    yield _usable("bitsandbytes", _bitsandbytes)
    yield _usable("flash-attention", _flash_attention)


def _usable(name: str, trial: Callable[[], str]) -> Finding:
    from bdpo_plugin.inspection.data_findings import OK, UNKNOWN, Finding

    try:
        return Finding(name, OK, trial())
    except Exception as error:  # a package without its GPU can raise anything
        return Finding(name, UNKNOWN, f"not usable: {_words(error)}")


def _bitsandbytes() -> str:
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.ones(64, 64, device=device)
    bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
    return f"{bitsandbytes.__version__} quantises to 4 bits on the {device}"


def _flash_attention() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")
    if torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError("the GPU is older than Ampere (sm_80)")
    if find_spec("flash_attn") is None:
        raise RuntimeError("the package flash-attn is not installed")
    from flash_attn import __version__ as release
    from flash_attn import flash_attn_func

    row = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16, device="cuda")
    flash_attn_func(row, row, row, causal=True)
    return f"{release}"


# A configuration ------------------------------------------------------------------------------


def _configuration(path: Path, config: Config) -> Iterator[Finding | dict[str, str]]:
    """Yields the findings about a configuration, and its first rows as dictionaries of texts."""
    from bdpo_plugin.inspection.data_findings import (
        FAILED,
        OK,
        UNKNOWN,
        WARNING,
        Finding,
        data_findings,
    )
    from bdpo_plugin.inspection.memory import weightless

    if config.host == "trl":
        yield from _of_trl(config)
        return
    try:
        check_preference(path, config)
    except click.ClickException as error:
        yield Finding("keys", FAILED, error.message)
        return
    asked = config.keys.get("rl" if config.host == "axolotl" else "pref_loss") == "bdpo"
    if not asked:
        key = "rl: bdpo" if config.host == "axolotl" else "pref_loss: bdpo"
        yield Finding("keys", WARNING, f"this is no B-DPO run: it has not `{key}`")
    if _version(config.host) is None:
        yield Finding("keys", FAILED, f"{config.host} is not installed in this environment")
        return
    inspecting: Any
    try:
        check_model(config.host, config.keys)
        if config.host == "axolotl":
            from bdpo_plugin.hosts.axolotl import inspection as inspecting

            data = inspecting.inspect(config.keys)
            if unknown := inspecting.unknown_keys(config.keys):
                words = f"Axolotl knows no {', '.join(unknown)}, and drops them silently"
                yield Finding("keys", WARNING, words)
        else:
            from bdpo_plugin.hosts.llamafactory import inspection as inspecting

            data = inspecting.inspect(path)
    except click.ClickException as error:
        yield Finding("configuration", FAILED, error.message)
        return
    except Exception as error:  # a host can raise anything at a configuration or its data
        yield Finding("configuration", FAILED, str(error) or _words(error))
        return
    yield Finding("configuration", OK, "the host takes it, and its data")
    yield from data_findings(data)
    decode = data.tokenizer.decode
    for pair in data.pairs[:_SHOWN]:
        yield {
            "prompt": decode(pair.chosen.prompt_ids),
            "chosen": decode(pair.chosen.completion_ids),
            "rejected": decode(pair.rejected.completion_ids),
        }
    try:
        model = weightless(data.plan)
    except (OSError, ValueError) as error:
        yield Finding("memory", UNKNOWN, _words(error))
        return
    yield _memory(model, data.plan)
    yield from _cost(model, data)


def _of_trl(config: Config) -> Iterator[Finding]:
    """Yields the findings about a configuration of `bdpo train`: its keys and its model."""
    from bdpo_plugin.hosts.trl.recipe_validation import problems
    from bdpo_plugin.inspection.data_findings import FAILED, OK, UNKNOWN, Finding
    from bdpo_plugin.settings import RECIPE

    found = list(problems({k: v for k, v in config.keys.items() if k != RECIPE}))
    try:
        check_model(config.host, config.keys)
    except click.ClickException as error:
        found.append(error.message)
    for problem in found:
        yield Finding("configuration", FAILED, problem)
    if not found:
        yield Finding("configuration", OK, "TRL's parser takes it, and its model is there")
        yield Finding(
            "data", UNKNOWN, "of TRL it is checked by `bdpo mi FILE` and `bdpo train FILE`"
        )


def _needs(config: Config, environment: Mapping[str, Finding]) -> Iterator[Finding]:
    """Yields a finding for each package that a configuration needs and that is not usable here."""
    from bdpo_plugin.inspection.data_findings import FAILED, OK, Finding

    keys = config.keys
    flash = keys.get("flash_attention") is True or keys.get("flash_attn") == "fa2"
    flash = flash or str(keys.get("attn_implementation")).startswith("flash_attention")
    quantised = keys.get("load_in_4bit") or keys.get("load_in_8bit") or keys.get("quantization_bit")
    for name, asked in (("flash-attention", flash), ("bitsandbytes", quantised)):
        if asked and environment[name].state != OK:
            words = f"the configuration asks for {name}, which is {environment[name].words}"
            yield Finding(f"{name} asked for", FAILED, words)


def _cost(model: Any, data: Any) -> Iterator[Finding]:
    """Yields the form of the batches, and the cost of an epoch relative to the host's own DPO."""
    import torch

    from bdpo_plugin.inspection.cost import epoch_cost
    from bdpo_plugin.inspection.data_findings import OK, UNKNOWN, Finding
    from bdpo_plugin.model.traits import Traits, row_rules
    from bdpo_plugin.reference.null_prompt import find_null_prompt
    from bdpo_plugin.settings import BDPOError

    text = torch.zeros(1, 1, dtype=torch.long)
    rules = row_rules(model, Traits.of(model), {"input_ids": text, "attention_mask": text})
    shared, attention = not isinstance(rules, str), model.config._attn_implementation
    words = (
        "a row without padding, in which the prompt of a pair stands once, if the trial of the "
        "model agrees"
        if shared
        else f"padded, as the host's: {rules}"
    )
    yield Finding("batches", OK, f"{attention} attention; {words}")
    settings, pairs = data.settings, data.pairs
    try:
        prompts = [pair.chosen.prompt_ids for pair in pairs]
        null = find_null_prompt(data.tokenizer, prompts, settings.null_prompt)
    except BDPOError:
        return  # data_findings has reported it
    if not pairs:
        return
    measured = settings.weighs or settings.control is not None
    found = epoch_cost(model, data.plan, pairs, len(null.ids), shared=shared, mi=measured)
    step, scoring = found.ours / found.host, found.scoring / found.host
    yield Finding(
        "cost",
        UNKNOWN if data.plan.rank is None else OK,
        "in operations of an epoch of the host's own DPO on these pairs, counted: the first epoch "
        f"{step + scoring:.2f} (steps {step:.2f}, scoring {scoring:.2f}), with scores kept from an "
        f"earlier run {step:.2f}, each further epoch {step:.2f}; at `bdpo_alpha: 0` "
        f"{step + found.plain_scoring / found.host:.2f}",
    )


def _memory(model: Any, plan: Any) -> Finding:
    import torch

    from bdpo_plugin.inspection.data_findings import OK, UNKNOWN, WARNING, Finding
    from bdpo_plugin.inspection.memory import estimate

    found = estimate(model, plan)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in found._asdict().items())
    words = f"about {found.peak:.1f} GiB on one device (estimated, in GiB: {parts})"
    if plan.rank is None:
        words += "; the adapter's part is not known"
    without = None
    if plan.checkpointing:
        without = estimate(model, dataclasses.replace(plan, checkpointing=False)).peak
        words += f"; without gradient checkpointing about {without:.1f}"
    if not torch.cuda.is_available():
        return Finding("memory", UNKNOWN, f"{words}; there is no GPU to compare with")
    there = torch.cuda.get_device_properties(0).total_memory / 2**30
    state = OK if found.peak < 0.9 * there else WARNING
    if without is not None and without < 0.9 * there:
        words += ", which fits too, and saves a fourth to a third of a step"
    return Finding("memory", state, f"{words}; the GPU has {there:.0f}")


# What is shown --------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses everything that hosts and their libraries print to stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
        try:
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def hider(keys: Mapping[str, Any]) -> Callable[[str], str]:
    """Returns a function that removes secrets from a text: those of the environment and those of a
    configuration."""
    entries = [*os.environ.items(), *_entries(keys)]
    secrets = {v for k, v in entries if is_secret(str(k), v) and len(v) >= 8}

    def hide(text: str) -> str:
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, LEFT_OUT)
        return re.sub(r"[\w-]{19,}", lambda m: LEFT_OUT if is_secret("", m[0]) else m[0], text)

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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, state, words in findings:
        table.add_row(name, Text(state, style=_COLOURS[state]), Text(visible(words)))
    console.print(table)
    if not rows:
        return
    table = Table(
        title="The first rows as the model reads them, the response in ⟦ ⟧",
        title_justify="left",
        show_lines=True,
    )
    for side in ("chosen", "rejected"):
        table.add_column(side, ratio=1, overflow="fold")
    for row in rows:
        cells = [Text(visible(row["prompt"])) for _ in range(2)]
        for cell, side in zip(cells, ("chosen", "rejected"), strict=True):
            cell.append(f"⟦{visible(row[side])}⟧", style="bold green")
        table.add_row(*cells)
    console.print(table)
