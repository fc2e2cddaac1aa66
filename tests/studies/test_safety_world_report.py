"""What is run and compared, and what the tables and figures say of it; no model is trained."""

import json
from dataclasses import replace
from random import Random

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from studies.safety_world import analysis, experiments, records, report, summary
from studies.safety_world.__main__ import main
from studies.safety_world.evaluate import HARMFUL, HARMLESS, score

FULL, QUICK = experiments.FULL, experiments.QUICK


def every(size):
    return experiments.stages(size, experiments.experiments(size))


# What is run ----------------------------------------------------------------------------------


def test_no_seed_is_in_the_tables_of_another_purpose():
    sizes = (FULL, experiments.CONFIRMATION, experiments.TUNING)
    for size in sizes:
        used = {job.arguments["seed"] for stage in every(size) for job in stage}
        assert used == set(size.seeds)
        assert len(used) >= 10 or size is experiments.TUNING
    assert len({seed for size in sizes for seed in size.seeds}) == 23
    assert set(QUICK.seeds) <= set(experiments.TUNING_SEEDS)


def test_the_confirmation_runs_what_the_final_tables_have():
    jobs = [every(replace(size, seeds=size.seeds[:1])) for size in (FULL, experiments.CONFIRMATION)]
    other = [
        [job._replace(arguments=job.arguments | {"seed": 0}) for job in stage] for stage in jobs[1]
    ]
    assert other == jobs[0]


@pytest.mark.parametrize("options", [("--quick", "--confirm"), ("--tune", "--confirm")])
def test_one_purpose_at_a_time(options):
    result = CliRunner().invoke(main, [*options, "--dry-run"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_every_comparison_names_rows_of_its_table():
    for size in (FULL, QUICK):
        for table in experiments.experiments(size):
            labels = set(table.labels)
            for contrast in table.contrasts():
                assert set(contrast.parts) <= labels, (table.name, contrast.label)
                assert sum(contrast.parts.values()) == pytest.approx(0)


def test_the_comparisons_of_the_plan_and_those_added():
    tables = experiments.experiments(FULL)
    made = [(table, contrast) for table in tables for contrast in table.contrasts()]
    added = [contrast.label for _, contrast in made if contrast.added]
    assert len(made) - len(added) == 111  # PLAN.md
    assert len(added) == 7 + 2 + 3  # SF - BW; alpha inside its range; what many epochs lose
    (p1,) = [t.identity(c) for t, c in made if (t.name, c.label) == ("controls", "B-DPO − DPO")]
    same = [f"{t.name}: {c.label}" for t, c in made if t.identity(c) == p1]
    assert same == [
        "alpha: beta 3, alpha 1.5 − beta 3, DPO",
        "controls: B-DPO − DPO",
        "ablation-ours: both − DPO",
        "noise: main, B-DPO − main, DPO",
        "pairs: main, B-DPO − main, DPO",
        "epochs: B-DPO, epoch 4 − DPO",
    ]


# The analysis ---------------------------------------------------------------------------------


def test_wilson_s_interval_as_tabled():
    assert analysis.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert analysis.wilson(0, 10) == pytest.approx((0.0, 0.278), abs=1e-3)


def test_bootstrap_of_paired_differences():
    found = analysis.difference([1.0, 2.0, 3.0, -1.0])
    assert found.mean == pytest.approx(1.25)
    assert found.low < 1.25 < found.high
    assert (found.improved, found.seeds) == (3, 4)
    wide = analysis.difference([1.0, 2.0, 3.0, -1.0], level=0.975)
    assert wide.low <= found.low
    same = analysis.difference([0.5] * 10)
    assert (same.low, same.high) == (0.5, 0.5)
    assert same.above
    assert same.text(2) == "+0.50 [+0.50, +0.50] 10/10"
    assert not found.above
    assert not analysis.difference([5.0]).above, "one seed has no interval"
    assert analysis.difference([]).text() == "–"


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.95, 1, 12.706), (0.95, 9, 2.262), (0.975, 9, 2.685), (0.99, 30, 2.750)],
)
def test_the_quantiles_of_t_as_tabled(level, freedom, expected):
    assert analysis.t_quantile(level, freedom) == pytest.approx(expected, abs=1e-3)


def test_student_s_interval_is_wider_than_the_bootstrap_s():
    values = [0.1, 0.5, -0.4, 1.2, 0.9, 0.3, 0.0, 0.7, -0.2, 0.6]
    low, high = analysis.student(values)
    assert (low, high) == pytest.approx((0.00987, 0.73013), abs=1e-4)  # scipy's
    found = analysis.difference(values)
    assert low < found.low < found.high < high


def test_p_over_all_flips_of_the_signs():
    assert analysis.sign_flip([1.0] * 10) == 2 / 1024
    assert analysis.sign_flip([-1.0, -2.0]) == 0.5
    assert analysis.sign_flip([1.0, 2.0, -3.0]) == 1
    assert analysis.sign_flip([0.3, 0.1, 0.2]) == 0.25


# The tables and figures -----------------------------------------------------------------------


def invented(job):
    """A result for any job, of its seed and method."""
    draw = Random(json.dumps(job))
    if job.task == "survey":
        pair = {"types": ["generic", "short"], "tokens": [7, 9]}
        kinds = ("harmful", "benign", "lookalike") * 4
        ways = ("scaffold, pointwise", "bos, expected")
        return {
            "pairs": [pair | {"kind": k, "mi": [draw.random(), draw.random()]} for k in kinds],
            "agreement": {w: {"sign": draw.random(), "correlation": 0.5} for w in ways},
        }
    rates = {name: draw.random() for name in (*HARMFUL, *HARMLESS)}
    types = {name: {"generic": 30} for name in rates}
    found = rates | {"score": score(rates), "types": types, "nll": 1.0, "margin": draw.random()}
    looks = {str(n): found | {"accuracy": 0.5} for n in job.arguments["looks"]}
    found |= {"accuracy": 0.5, "train_margin": draw.random(), "looks": looks}
    if job.arguments["method"] == "ours:within":
        found |= {"pairs": 61, "gap": 0.25, "scale": 0.93, "weight_sd": 0.4, "unmoved": 0.125}
    return found


def written(folder, size, missing=0):
    """The tables, from results that are invented, but for the first `missing`."""
    jobs = every(size)[1]
    for job in jobs[missing:]:
        file = job.file(folder)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"result": invented(job)}))
    failed = {job.file(folder).stem: "Traceback" for job in jobs[:missing]}
    tables = experiments.experiments(size)
    (folder / "results").mkdir()
    records.write_records(every(size), folder, failed, folder / "results" / records.NAME)
    report.write(size, tables, folder / "results")
    return tables, failed, (folder / "results" / "tables.md").read_text()


def test_the_tables_are_made_again_from_the_records_alone(tmp_path):
    size = replace(QUICK, seeds=(900,))
    _, _, text = written(tmp_path, size, 3)
    only = tmp_path / "elsewhere"
    only.mkdir()
    (tmp_path / "results" / records.NAME).rename(only / records.NAME)
    given = ["--quick", "--from-records", "--results", str(only), "--work", str(tmp_path / "no")]
    found = CliRunner().invoke(main, given)
    assert found.exit_code == 0, found.output
    assert (only / "tables.md").read_text() == text
    (only / records.NAME).unlink()
    found = CliRunner().invoke(main, given)
    assert found.exit_code == 1
    assert "has no records.jsonl.gz" in found.output


@pytest.mark.parametrize("missing", [0, 40, 200])
def test_tables_and_figures_with_and_without_failed_runs(tmp_path, missing):
    tables, failed, text = written(tmp_path, replace(QUICK, seeds=(900, 901)), missing)
    assert f"Jobs that failed: {len(failed)}" in text
    assert all(name in text for name in failed)
    for table in tables:
        assert f"## {table.title}" in text
        assert all(f"\n| {label} |" in text for label in table.labels)
        for contrast in table.contrasts():
            label = contrast.label + " †" * contrast.added
            assert text.count(f"\n| {label} |") >= len(report.COMPARED)
    contrasts = [(t.identity(c), c) for t in tables for c in t.contrasts()]
    assert f"{len(contrasts)} contrasts, " in text
    assert f"{13 * len(contrasts)} in all" in text
    assert f"{len({identity for identity, _ in contrasts})} of the contrasts are distinct" in text
    pngs = {file.stem: file.stat().st_size for file in (tmp_path / "results").glob("*.png")}
    assert len(pngs) == 8
    assert min(pngs.values()) > 5000


def test_what_the_arms_were(tmp_path):
    _, _, text = written(tmp_path, QUICK)
    section = text.split("## B-DPO and its controls")[1].split("\n## ")[0]
    assert "| MI shuffled within types | 61 | 0.25 | – | – | 0.93 | 0.40 | 12 |" in section
    assert "| DPO | – | – | – | – | – | – | – |" in section


def levels_of(**scores):
    """Each row's scores over the seeds, in points."""
    return {label: [{"score": s / 100} for s in of_seeds] for label, of_seeds in scores.items()}


def test_the_rules_are_decided():
    """`power` is better than ours and than its control on every seed, `ratio` on eight."""
    seeds, flat = range(10), [50.0] * 10
    gained = [60 + seed / 10 for seed in seeds]
    eight = [60 if seed > 1 else 49 for seed in seeds]
    arms = {"DPO": flat, "BW": flat, "SF": flat, "control": flat}
    levels = {f"ablation-{r}": levels_of(**arms, both=flat) for r in summary.READINGS}
    levels["ablation-power"] = levels_of(**arms, both=gained)
    levels["ablation-ratio"] = levels_of(**arms, both=eight)
    levels["controls"] = levels_of(**{"DPO": flat, "random weights": gained})

    def agreement(**signs):
        ways = {"scaffold, pointwise": 0.7} | {f"{way}, expected": s for way, s in signs.items()}
        ways["marginal over 16 queries"] = 0.9
        return {"agreement": {way: {"sign": sign} for way, sign in ways.items()}}

    surveys = [agreement(bos=0.9, scaffold=0.8), None, agreement(bos=0.72, scaffold=0.76)]
    lines = list(summary.rules(levels, surveys))
    assert "Both hold for: power." in lines
    by_name = {tuple(line.strip("| ").split(" | ")[:2]): line for line in lines}
    assert by_name["power", "both − ours, both"].endswith("10/10 | [+10.2, +10.7] | 0.002 | yes |")
    assert by_name["ratio", "both − its control"].endswith("| no |")
    assert "8/10" in by_name["ratio", "both − its control"]
    ends = {line.split(" | ")[0].strip("| "): line.split(" | ")[-2:] for line in lines}
    assert ends["bos, expected"] == ["+2.0", "no |"]
    assert ends["scaffold, expected"] == ["+6.0", "yes |"]
    assert ends["marginal over 16 queries"][1] == "needs other data |"
    assert ends["random weights − DPO"][1] == "yes |"

    text = "\n".join(summary.readings(levels))
    assert "Most over its control: power, +10.4" in text
    assert "Over its control with an interval above 0: ratio, power." in text
    assert "That, and the whole pattern by the means: none." in text


def test_what_is_held_out_is_a_measure():
    (table,) = [t for t in experiments.experiments(QUICK) if t.name == "controls"]
    part = {"harmful_topics": 0.2, "harmful_wrappers": 0.3, "benign_topics": 0.7}
    levels = table.levels((1, 2), lambda job: part if job.arguments["seed"] == 1 else None)
    assert levels["DPO"] == [part | {"held_out": pytest.approx(0.4)}, None]
