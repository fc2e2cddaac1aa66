"""What is installed and what the machine has, for `bdpo doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from bdpo_plugin import __version__
from bdpo_plugin.hosts import part
from bdpo_plugin.inspection.findings import FAILED, OK, UNKNOWN, WARNING, Finding
from bdpo_plugin.recipes.host_config import HOSTS, Config

_REINSTALL = "pip install --force-reinstall --no-deps ./bdpo-plugin"

#: The line by which a configuration of each host asks for PyTorch's own attention.
_SDPA = {
    "axolotl": "attn_implementation: sdpa",
    "llamafactory": "flash_attn: sdpa",
    "trl": "attn_implementation: sdpa",
}
#: Host -> its module that names the tested releases.
_TESTED_IN = {"axolotl": "rewrite_config", "llamafactory": "arguments", "trl": "limits"}


def environment() -> Iterator[Finding]:
    """Yields what is installed, whether B-DPO is active, and which hardware there is."""
    yield Finding("bdpo-plugin", OK, f"{__version__}, Python {sys.version.split()[0]}")
    for package, host in HOSTS.items():
        yield _host(package, host.name)
    off = _entry_point_off()
    yield off or Finding("entry point", OK, "active: PyTorch calls it when it is imported")
    if installed("axolotl"):
        yield _plugin(off)
    if installed("llamafactory"):
        words = "`pref_loss: bdpo` is not known: the entry point is its only way"
        on = Finding("key in LLaMA-Factory", OK, "`pref_loss: bdpo` works")
        yield on._replace(state=FAILED, words=words, fix=off.fix) if off else on
    yield from _machine()


def needs(config: Config, environment: Mapping[str, Finding]) -> Iterator[Finding]:
    """Yields a finding for each package that a configuration needs and that is not usable here.

    Args:
        config: the configuration.
        environment: the findings of :func:`environment`, by name.
    """
    keys = config.keys
    flash = keys.get("flash_attention") is True or keys.get("flash_attn") == "fa2"
    flash = flash or str(keys.get("attn_implementation")).startswith("flash_attention")
    quantised = keys.get("load_in_4bit") or keys.get("load_in_8bit") or keys.get("quantization_bit")
    for name, asked, fix in (
        ("flash-attention", flash, _SDPA[config.host]),
        ("bitsandbytes", quantised, "pip install bitsandbytes"),
    ):
        if asked and environment[name].state != OK:
            words = f"the configuration asks for {name}, which is {environment[name].words}"
            yield Finding(f"{name} asked for", FAILED, words, fix)


def installed(package: str) -> str | None:
    """Returns the release of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def words_of(error: BaseException) -> str:
    """Returns an error of another library in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def _host(package: str, name: str) -> Finding:
    if (release := installed(package)) is None:
        return Finding(name, UNKNOWN, "not installed")
    if package == "trl" and installed("llamafactory"):
        return Finding(name, OK, f"{release}, as LLaMA-Factory wants it")
    try:
        tested = part(package, _TESTED_IN[package]).TESTED
    except Exception as error:  # a broken installation can raise anything
        words = f"{release} cannot be imported: {words_of(error)}"
        return Finding(name, FAILED, words, f"pip install --force-reinstall '{package}=={release}'")
    if release in tested:
        return Finding(name, OK, f"{release}, which is tested")
    refused = package == "llamafactory"
    return Finding(
        name,
        FAILED if refused else WARNING,
        f"{release} is {'refused' if refused else 'not tested'}; tested: {', '.join(tested)}",
        f"pip install '{package}=={tested[0]}'",
    )


def _entry_point_off() -> Finding | None:
    """Returns why PyTorch does not call our entry point when it is imported, or None if it does."""
    for name, value in (
        ("BDPO_AUTOLOAD", os.environ.get("BDPO_AUTOLOAD")),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")),
    ):
        if value == "0":
            words = f"off: the environment variable {name} is 0"
            return Finding("entry point", WARNING, words, f"unset {name}")
    if any(e.name == "bdpo_plugin" for e in entry_points(group="torch.backends")):
        return None
    words = "not installed: reinstall bdpo-plugin in this environment (pip install)"
    return Finding("entry point", WARNING, words, _REINSTALL)


def _plugin(off: Finding | None) -> Finding:
    try:
        import bdpo_plugin.hosts.axolotl.plugin
        import bdpo_plugin.hosts.axolotl.trainer  # noqa: F401
    except Exception as error:  # a broken installation can raise anything
        words = f"the plugin is not importable: {words_of(error)}"
        return Finding("key in Axolotl", FAILED, words, _REINSTALL)
    if off is None:
        return Finding("key in Axolotl", OK, "`rl: bdpo` works, with `plugins:` and without")
    line = "plugins: [bdpo_plugin.BDPOPlugin]"
    return Finding("key in Axolotl", WARNING, f"`rl: bdpo` works only with `{line}`", line)


def _machine() -> Iterator[Finding]:
    import torch

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
    try:
        return Finding(name, OK, trial())
    except Exception as error:  # a package without its GPU can raise anything
        return Finding(name, UNKNOWN, f"not usable: {words_of(error)}")


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
