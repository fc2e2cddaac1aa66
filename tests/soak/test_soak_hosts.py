"""Some of the rows of soak/hosts, of the host of this environment."""

from importlib.util import find_spec

import pytest
import warm
from cases import first

from soak.hosts.judge import judge
from soak.hosts.rows import METHODS, load
from soak.hosts.run import HOSTS
from soak.hosts.runner import Runner

HOST = next(filter(find_spec, HOSTS), None)
ROWS = [row for row in load(HOST) if row.quick] if HOST else []

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(HOST, tmp_path_factory.mktemp("material"), warm.server(*HOSTS[HOST][1]))


@pytest.mark.parametrize("row", first(3, ROWS), ids=lambda row: row.name)
def test_alpha_0_is_the_hosts_dpo(runner, row, tmp_path):
    verdict = judge(row, *(runner.run(row, m, tmp_path / m) for m in METHODS[HOST]))
    assert verdict.holds, verdict.words
