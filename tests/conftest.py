"""One environment for all tests: offline, on the CPU, with a score cache of its own."""

import gc
import os
import tempfile

import hypothesis
import pytest

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",  # Liger's kernels run on the CPU
    "XDG_CACHE_HOME": tempfile.mkdtemp(),  # never the user's, in fixtures of any scope
    # set by Axolotl's command line when a test imports it: the same from the start, so that a
    # process made before that import can run a command after it (warm.py)
    "HF_XET_HIGH_PERFORMANCE": "1",
    "AXOLOTL_DATASET_NUM_PROC": "1",  # where a configuration does not say: a process imports torch
    "OMP_NUM_THREADS": "1",  # on tiny models threads only wait for each other
}

_ENVIRONMENT = dict(os.environ)


def pytest_collection_finish() -> None:
    """Take back what the imports of the test modules left in the environment, and have the garbage
    collector, which trainers call, pass over all that has been imported: half a second each."""
    _restore(_ENVIRONMENT)
    gc.collect()
    gc.freeze()


def _restore(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


# No deadline: a slow machine is not a failure. Derandomised: what CI sees is what you see.
hypothesis.settings.register_profile("bdpo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("bdpo")


@pytest.fixture(autouse=True, scope="module")
def _own_environment():
    """What the tests of one module leave in the environment, those of the next do not see."""
    before = dict(os.environ)
    yield
    _restore(before)


@pytest.fixture(autouse=True)
def _own_score_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    from bdpo_plugin.demo.tiny import build_tokenizer

    return build_tokenizer()
