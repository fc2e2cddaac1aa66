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
OTHERS = bool(find_spec("llamafactory") or find_spec("axolotl"))
beside_trl_first = pytest.mark.exhaustive if OTHERS else lambda test: test
beside_trl_alone = pytest.mark.skipif(
    OTHERS,
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
@beside_trl_first
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
@pytest.mark.exhaustive
@beside_trl_alone
def test_reference_pass(tmp_path):
    shown, saved = run("reference_pass", tmp_path, "--repeats", "1", "--host", "trl")
    assert "The reference pass, TRL's without MI" in shown
    assert set(saved["results"]) == {"TRL", "pointwise", "expected"}
    assert all(result["pass_s"] > 0 for (result,) in saved["results"].values())


@pytest.mark.slow
@pytest.mark.exhaustive
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
@pytest.mark.exhaustive
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
@pytest.mark.exhaustive
@beside_trl_alone
def test_gpu_on_the_cpu(tmp_path, monkeypatch) -> None:
    """Both tables, on tiny shapes; what is missing, and what has no time, is told below them."""
    from click.testing import CliRunner

    from benchmarks import gpu

    branches = (*gpu.BRANCHES, "--model", "Qwen2", "--precision", "float32")
    monkeypatch.setattr(gpu, "BRANCHES", branches)
    monkeypatch.setattr(gpu, "METHODS", {"B-DPO": gpu.METHODS["B-DPO"]})
    file = tmp_path / "found.json"
    given = ["--device", "cpu", "--tiny", "--only", "7B", "--json", str(file)]
    result = CliRunner().invoke(gpu.main, given)
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert [row["verdict"] for row in saved["branches"]["rows"]] == ["right"] * 4
    assert "| Qwen2 | sdpa | float32 | lora | on | segments 4 | " in result.output
    run = saved["results"]["7B, LoRA, sdpa"]["of"]["B-DPO"]
    assert run["steps"] == 6
    assert run["calls"]["reads"] > 0
    assert run["wall_s"] > run["pass_s"] > run["warm_step_s"] > 0
    shown = f" | {run['calls']['reads']:.4g} | – | – | – |"
    assert shown in result.output
    saved["results"]["7B, LoRA, sdpa"]["of"]["DPO"] = run | {"wall_s": 2 * run["wall_s"]}
    assert shown.replace("– | – | –", "0.50 | 1.00 | 1.00") in "\n".join(gpu.report(saved))
    assert "Left out: flash_attention_2: transformers finds no package" in result.output
    late = CliRunner().invoke(gpu.main, [*given, "--minutes", "-1"])
    assert "Left out: 7B, LoRA, sdpa, B-DPO: no time left" in late.output
    assert json.loads(file.read_text())["branches"]["rows"] == []


@beside_trl_alone
def test_a_branch_that_is_wrong_is_told(monkeypatch) -> None:
    from bdpo_plugin.model import reader, tree_attention
    from benchmarks import branches

    case = branches.Case("Mistral", "sdpa", "float32", "lora", checkpointing=True)
    found = branches.compare(case, "cpu")
    assert (found["verdict"], found["kernels"]) == ("right", {"segments": 4})
    assert found["off"]["row"]["gradients"] < 1e-5

    off = {"loss": (0.0, 1.0), "logps": (2e-2, 1.0), "gradient of a": (1e-2, 1.0)}
    row = {"loss": (5e-3, 1.0), "logps": (5e-2, 1.0), "gradient of a": (3.9e-2, 1.0)}
    assert branches._wrong({"padded": off, "row": row}) == []
    row |= {"logps": (math.nan, 1.0), "gradient of a": (5e-2, 1.0)}
    assert branches._wrong({"padded": off, "row": row}) == ["logps", "gradient of a"]

    in_order, joined = reader.in_order, tree_attention._joined

    def turned(states, order):
        return in_order(states, order if order is None else order.flip(0))

    def without_beginning(first, segment, begin, end):
        return joined(segment, segment, begin, end)

    with monkeypatch.context() as patched:  # behind the attention, where no probe looks
        patched.setattr(reader, "in_order", turned)
        assert branches.compare(case, "cpu")["verdict"].startswith("WRONG: loss, logps, ")
    monkeypatch.setattr(tree_attention, "_joined", without_beginning)
    assert branches.compare(case, "cpu")["verdict"].startswith("NOT TAKEN: ")
    monkeypatch.setattr(branches, "_batch", lambda device: None)
    assert branches.compare(case, "cpu")["verdict"].startswith("FAILED: AttributeError")
