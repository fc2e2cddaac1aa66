"""The benchmarks run, beside the host of this environment, and their tables say what was run."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("psutil")
ROOT = Path(__file__).parents[2]
beside_trl_alone = pytest.mark.skipif(
    bool(find_spec("llamafactory") or find_spec("axolotl")),
    reason="is the same in every environment: it runs beside TRL alone",
)
SMALL = (
    *("--hidden", "16", "--intermediate", "16", "--layers", "1", "--heads", "2", "--kv-heads", "2"),
    *("--vocabulary", "64", "--pairs", "4", "--batch", "2"),
    *("--prompt", "12", "--response", "6", "--shortest", "4", "--longest", "12"),
)


def run(name, tmp_path, *options):
    """What a benchmark printed, and the JSON that it wrote."""
    file = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *SMALL, *options],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_epoch_of_both(tmp_path):
    hosts = [host for host in ("axolotl", "llamafactory") if find_spec(host)] or ["trl"]
    collecting = ["--collecting"] if hosts[0] == "axolotl" else []
    precomputed = ["--precomputed"] if hosts[0] == "trl" else []
    alpha_0 = ["--alpha-0"] if hosts[0] == "trl" else []
    given = ("--repeats", "1", "--epochs", "2", "--warm", *alpha_0, *collecting, *precomputed)
    shown, saved = run("epoch", tmp_path, *given)
    assert saved["setting"]["host"] == hosts[0]
    assert f"2 epochs, {hosts[0]}, cpu, adapter none" in shown
    methods = {"DPO", "B-DPO", "B-DPO, warm"} | ({"B-DPO, collecting"} if collecting else set())
    methods |= {"DPO, precomputed", "B-DPO, alpha 0"} if precomputed else set()
    assert set(saved["results"]) == methods
    for method, (result,) in saved["results"].items():
        assert result["steps"] == 4
        assert result["tokens"] > 2 * 4 * 2 * 12
        assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["wall_s"])
        assert 0 < result["train_s"] <= result["wall_s"]
        assert 0 < result["peak_over_load_mib"] < result["peak_mib"]
        assert (result["pass_s"] > 0) == (method != "DPO")


@pytest.mark.slow
@beside_trl_alone
def test_reference_pass(tmp_path):
    shown, saved = run("reference_pass", tmp_path, "--repeats", "1", "--host", "trl")
    assert "The reference pass, TRL's without MI" in shown
    assert set(saved["results"]) == {"TRL", "pointwise", "expected"}
    assert all(result["pass_s"] > 0 for (result,) in saved["results"].values())


@pytest.mark.slow
@pytest.mark.skipif(bool(find_spec("axolotl")), reason="runs beside TRL and LLaMA-Factory")
def test_startup(tmp_path):
    """It ends before the first forward on the data, and its parts are all that a run of ours does
    until then, the trial of the model included; `benchmarks.floor` has them of whole runs."""
    host = "llamafactory" if find_spec("llamafactory") else "trl"
    shown, saved = run("startup", tmp_path, "--pairs", "40", "--host", host)
    took = saved["results"]
    assert "Start-up on 40 pairs" in shown
    assert took["the host's own preparation"][0] > 0
    assert took["probe of the model"][0] > 0
    ours = took["ours, all of it"][0]
    assert ours > took["token ids read"][0] > 0
    assert took["ours / host"][0] == pytest.approx(ours / took["the host's own preparation"][0])


@pytest.mark.slow
@beside_trl_alone
def test_scaling(tmp_path):
    plot = tmp_path / "curves.png"
    options = ("--host", "trl", "--no-host", "--sweep", "pairs=2,4", "--plot", str(plot))
    shown, saved = run("scaling", tmp_path, *options)
    assert "Against pairs" in shown
    steps = [result["steps"] for result in saved["curves"]["pairs"]["results"]["bdpo"]]
    assert steps == [1, 2]
    assert plot.stat().st_size > 5000


def test_the_largest_within_a_limit_of_memory():
    """A method whose last run was over it has fewer runs than the other."""
    from benchmarks import scaling

    def made(*peaks):
        keys = [*scaling.MEASURES, *scaling.RATIOS]
        return [dict.fromkeys(keys, 2.0) | {"peak_mib": peak} for peak in peaks]

    results = {"dpo": made(100.0, 400.0), "bdpo": made(90.0, 200.0, 310.0)}
    curve = {"values": [1, 2, 4], "results": results}
    assert scaling._largest("batch", curve, 300.0) == "Largest batch within 300 MiB: dpo 1, bdpo 2"
    results["dpo"] = [dict.fromkeys(results["dpo"][0], math.inf)]  # not even one fitted into a GPU
    assert "dpo none of them, bdpo 2" in scaling._largest("batch", curve, 300.0)
    columns = {
        column.header: list(column.cells) for column in scaling.table("batch", curve).columns
    }
    ratio = columns[""].index("bdpo / dpo: peak memory")
    assert columns["1"][ratio] == "0.00"
    assert columns["2"][ratio] == ""


def test_an_option_without_sense_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--sweep", "colour=red"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "'colour=red'" in done.stderr


@pytest.mark.slow
@beside_trl_alone
def test_gpu_on_the_cpu(tmp_path, monkeypatch) -> None:
    """Its rows on a tiny shape; what is missing, and what fails, is told below the table."""
    from click.testing import CliRunner

    from benchmarks import gpu

    small = {"hidden": 16, "intermediate": 16, "layers": 1, "heads": 2, "kv_heads": 2}
    small |= {"vocabulary": 64, "batch": 2, "prompt": 12, "response": 6, "shortest": 4}
    small |= {"longest": 12, "pairs": 4, "host": "trl", "dtype": "float32"}
    monkeypatch.setattr(gpu, "SIZES", {"7B": small})
    monkeypatch.setattr(gpu, "METHODS", {name: gpu.METHODS[name] for name in ("DPO", "B-DPO")})
    monkeypatch.setattr(gpu, "ROWS", (("7B", "lora", "sdpa"), ("7B", "lora", "flash_attention_2")))
    given = ["--device", "cpu", "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(gpu.main, given)
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["results"]["7B, lora, sdpa"]["of"]["B-DPO"]["steps"] == 2
    assert "| 7B, lora, sdpa | " in result.output
    assert "Left out: 7B, lora, flash_attention_2: no flash_attn" in result.output
    assert "no time left" in CliRunner().invoke(gpu.main, [*given, "--minutes", "-1"]).output
