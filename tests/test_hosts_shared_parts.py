"""What the hosts share: groups of keys, parts by name, and how functions are wrapped."""

import inspect
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from bdpo_plugin.hosts import part, side_effects
from bdpo_plugin.hosts.wrapping import wrap
from bdpo_plugin.settings import RECIPE

HOSTS = ("axolotl", "llamafactory", "trl")


@pytest.mark.parametrize("host", HOSTS)
def test_no_key_is_in_two_groups(host):
    text = Path(side_effects.__file__).parent.joinpath(host, "keys.yml").read_text()
    groups = yaml.safe_load(text)
    keys = [*groups.pop("writes"), *(key for words in groups.values() for key in words.split())]
    assert sorted(set(keys)) == sorted(keys)
    assert set(keys) == part(host, "side_effects").KEYS


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_shared_has_no_side_effects_and_no_unknown_key(host):
    of = part(host, "side_effects")
    keys = dict.fromkeys((*of.KEYS, "nonesuch"), "x") | {"bdpo_alpha": 1.0, RECIPE: {}}
    shared = of.for_sharing(keys)
    assert not shared.keys() & {*of.DROPPED, "nonesuch", "hf_hub_token", "axolotl_config_path"}
    assert shared.keys() >= {"bdpo_alpha", RECIPE, *of.WRITES}


@pytest.mark.parametrize("name", ["for_sharing", "without_side_effects"])
def test_parts_of_one_name_have_the_same_functions(name):
    found = [getattr(part(host, "side_effects"), name) for host in HOSTS]
    first, *others = [list(inspect.signature(function).parameters) for function in found]
    for other in others:
        assert other[: len(first)] == first


def test_a_wrapped_function_is_called_with_what_was_changed_and_is_wrapped_once():
    def add(left, right=1, **more):
        return left + right + sum(more.values())

    module = ModuleType("module")
    module.add = add
    calls = []

    def around(call, given):
        calls.append(dict(given))
        given["right"] = 10
        return call() * 2

    for _ in range(2):
        wrap(module, "add", around)
    assert module.add(1) == 22
    assert module.add(left=1, more=4) == 30
    assert calls == [{"left": 1}, {"left": 1, "more": {"more": 4}}]
    assert module.add.__wrapped__ is add
