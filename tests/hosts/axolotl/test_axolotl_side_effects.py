"""Every key of Axolotl's schema is known to the commands that only look."""

import re
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

from axolotl import integrations
from axolotl.utils.schemas.config import AxolotlInputConfig

from bdpo_plugin.hosts.axolotl import side_effects
from bdpo_plugin.hosts.axolotl.side_effects import DROPPED, OTHERS, SAVES, SHARES, WRITES

#: Names of what leaves a machine, or is left on it.
SMELL = re.compile(r"hub|wandb|mlflow|comet|trackio|swanlab|otel|tensorboard|gradio|ray_|profil")


def keys_of_plugins():
    """What the arguments of Axolotl's own plugins declare, by the classes that they name."""
    sources = Path(integrations.__path__[0]).rglob("*.py")
    named = r'return "(axolotl\.integrations\.[\w.]+)\.(\w+(?:Args|Config))"'
    classes = {found for source in sources for found in re.findall(named, source.read_text())}
    assert len(classes) >= 15
    for module, name in classes:
        if "llm_compressor" in module:  # which needs a package that is not installed here
            yield "llmcompressor"
        else:
            yield from getattr(import_module(module), name).model_fields


@pytest.mark.slow
def test_every_key_is_in_one_list():
    schema = AxolotlInputConfig.model_fields
    known = {*schema, *(field.alias for field in schema.values() if field.alias)}
    assert known | set(keys_of_plugins()) == side_effects.KEYS
    groups = (DROPPED, SAVES, SHARES, OTHERS, WRITES)
    assert sum(len(group) for group in groups) == len(side_effects.KEYS)
    assert not [key for key in OTHERS if SMELL.search(key)]


def test_a_configuration_without_side_effects(tmp_path):
    keys = dict.fromkeys(side_effects.KEYS, "x") | {"lora_rr": 4, "bdpo_alpha": 1.0}
    keys["plugins"] = [
        "axolotl.integrations.liger.LigerPlugin",
        "axolotl.integrations.swanlab.SwanLabPlugin",
        "of_a_stranger.Plugin",
    ]
    kept = side_effects.without_side_effects(keys, tmp_path)
    assert kept.keys() == keys.keys() - DROPPED
    assert kept["plugins"] == ["axolotl.integrations.liger.LigerPlugin", "of_a_stranger.Plugin"]
    assert kept["output_dir"] == str(tmp_path / "run")
    assert kept["dataset_prepared_path"] == str(tmp_path / "prepared")
    # Axolotl's default for the prepared data is a folder where the command was called
    assert "dataset_prepared_path" in side_effects.without_side_effects({}, tmp_path)
