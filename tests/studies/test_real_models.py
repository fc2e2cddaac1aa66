"""The study of a real model: its data, runs and tables, on a tiny model and small sources."""

import csv
import gzip
import json
import operator
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("sklearn")

from click.testing import CliRunner
from real_runs import make_tiny

from bdpo_plugin.demo.tiny import preference_pairs
from studies.real_models import __main__ as main_module
from studies.real_models import analysis, design, hand_labels, material, report, tasks
from studies.real_models.__main__ import main
from studies.real_models.design import (
    ARMS,
    HELD_OUT,
    PRESETS,
    Job,
    Preset,
    Sizes,
    Training,
    Where,
)
from studies.real_models.material import half, shorten
from studies.real_models.refusal import outcome, read_prompts
from studies.real_models.tasks import missing, score
from studies.real_models.train import Bench

MAIN = PRESETS["smollm2-cpu"].arms
SIZES = Sizes(harmful=2, unsafe=2, safe=2, ordinary=2, answer=4, hh=3, nll=2)
TRAINING = Training(xstest=8, hh=4, epochs=1, batch=4, tokens=48, rate=1e-2)
PRESET = Preset(
    seeds=(0,), arms=("dpo", "bdpo"), dtype="float32", training=TRAINING, sizes=SIZES, at_a_time=4
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny")) / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny world's pairs in the forms of the sources."""
    folder = tmp_path_factory.mktemp("data")
    found = {p["messages"][0]["content"]: p for p in preference_pairs(300, seed=0, split="train")}
    texts = [(q, p["chosen"]["content"], p["rejected"]["content"]) for q, p in found.items()][:60]
    assert len(texts) == 60
    (folder / "xstest").mkdir()
    types = ["homonyms", "contrast_homonyms", "definitions", "contrast_definitions"]
    for model, place in (("one", 1), ("two", 2)):
        with (folder / "xstest" / f"{model}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "type", "prompt", "completion", "final_label"])
            for i, found in enumerate(texts[:40]):
                unsafe = i % 4 in (1, 3)
                refusal = (place == 1) == unsafe
                label = "2_full_refusal" if refusal else "1_full_compliance"
                rows.writerow([i, types[i % 4], found[0], found[place], label])
    for name in ("hh-rlhf", "strongreject", "llamafactory"):
        (folder / name).mkdir()
    with gzip.open(folder / "hh-rlhf" / "harmless-base.test.jsonl.gz", "wt") as file:
        for question, good, bad in texts[40:]:
            ask = f"\n\nHuman: {question}\n\nAssistant: "
            file.write(json.dumps({"chosen": ask + good, "rejected": ask + bad}) + "\n")
    with (folder / "strongreject" / "strongreject_dataset.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["category", "source", "forbidden_prompt"])
        rows.writerows(["x", "y", question] for question, *_ in texts[:5])
    with gzip.open(folder / "llamafactory" / "dpo_en_demo.json.gz", "wt") as file:
        turns = [
            {
                "conversations": [{"from": "human", "value": question}],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": bad},
            }
            for question, good, bad in texts[:6]
        ]
        json.dump(turns, file)
    return folder


@pytest.fixture(scope="module")
def bench(model, data, tmp_path_factory):
    return Bench(PRESET, Where(str(model), data, None, tmp_path_factory.mktemp("work")))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I’m sorry, but I can't help with that.", "refused"),
        ("That would be wrong.\nI  CANNOT assist.", "refused"),
        ("It is illegal to pick locks that are not yours.", "refused"),
        ("Turn the pick gently.", "answered"),
        ("Turn the pick gently. " * 20 + "I'm sorry.", "answered"),
        (" \n", "empty"),
    ],
)
def test_outcome(answer, expected) -> None:
    assert outcome(answer) == expected


def test_the_prompts_of_this_study() -> None:
    sizes = {f.stem: len(set(read_prompts(f))) for f in material._PROMPTS.glob("*.txt")}
    assert sizes == {"harmful": 40, "lookalike": 40, "benign": 30}


def test_an_answer_is_cut_after_a_sentence(bench) -> None:
    text = "Turn it with care. First, wait for the night. Then go."
    tokenizer = bench.tokenizer
    short, whole = (
        len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text[:18], text)
    )
    assert shorten(text, tokenizer, short) == "Turn it with care."
    assert shorten(text, tokenizer, whole) == text
    assert shorten(text, tokenizer, short - 1) == ""


def test_nothing_held_out_is_trained_on(bench) -> None:
    held_out = {choice.prompt for choice in bench.material.choices}
    assert {choice.type for choice in bench.material.choices} <= set(HELD_OUT)
    for seed in (0, 1):
        pairs = bench.material.training(TRAINING, seed)
        assert len(pairs) == 12
        assert not held_out & {pair["messages"][0]["content"] for pair in pairs}
    evaluated = {json.dumps(pair) for pair in bench.material.hh_held_out}
    assert not evaluated & {json.dumps(pair) for pair in bench.material.hh}


def test_halves_are_alike_but_for_their_imbalance(bench) -> None:
    def pairs(arm):
        return bench.pairs(Job(preset=PRESET, arm=arm, seed=0))

    def labels(found):
        return sorted(pair["label"] for pair in found)

    twice = bench.material.training(replace(TRAINING, xstest=16, hh=8), 0)
    for one, other in (("imbalanced", "balanced"), ("one-half", "other-half")):
        both = [pairs(one), pairs(other)]
        assert labels(both[0]) == labels(both[1]) == labels(pairs("dpo"))
        assert sorted(map(json.dumps, both[0] + both[1])) == sorted(map(json.dumps, twice))


def test_a_couple_is_parted_by_its_imbalance() -> None:
    pairs = [{"label": label} for label in "aabbaa"]
    tokens = [(5, 5), (30, 9), (7, 7), (8, 8), (6, 5), (30, 8)]
    gaps = [0.1, 0.9, 0.5, 0.4, 0.2, 0.3]  # couples: 0 and 4, 1 and 5, 2 and 3
    pairs = [{**pair, "gap": gap} for pair, gap in zip(pairs, gaps, strict=True)]
    for seed in range(5):
        found = [pair["gap"] for pair in half(pairs, gaps, tokens, "imbalanced", seed)]
        assert found == [0.9, 0.5, 0.2]
        assert [p["gap"] for p in half(pairs, gaps, tokens, "balanced", seed)] == [0.1, 0.4, 0.3]
    one = {tuple(p["gap"] for p in half(pairs, gaps, tokens, "one", seed)) for seed in range(20)}
    assert len(one) > 3


def test_the_likelihood_of_an_answer_is_the_models_own(bench) -> None:
    import torch

    asked = bench.evaluation.asked[:5]
    model, logps = bench.model(), bench.evaluation.logps
    for (messages, answer), (nats, tokens) in zip(asked, logps(model, asked), strict=True):
        ids, prompt = logps.row(messages, answer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        alone = sum(logits[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
        assert (nats, tokens) == (pytest.approx(alone, abs=1e-3), len(ids) - prompt)


@pytest.fixture(scope="module")
def runs(bench):
    arms = ("untrained", "dpo", "bdpo", "shuffled-label", "safedpo")
    return {arm: bench.run(Job(preset=PRESET, arm=arm, seed=0)) for arm in arms}


def test_each_arm_is_what_its_name_says(runs) -> None:
    def weights(arm):
        return list(zip(runs[arm]["weight_chosen"], runs[arm]["weight_rejected"], strict=True))

    assert set(weights("dpo")) == set(weights("safedpo")) == {(1.0, 1.0)}
    assert len(set(weights("bdpo"))) == 12
    assert sorted(weights("bdpo")) == sorted(weights("shuffled-label"))
    assert not any(map(operator.eq, weights("bdpo"), weights("shuffled-label")))
    trained = [runs[arm]["hh_margin"] for arm in ("dpo", "bdpo", "shuffled-label", "safedpo")]
    assert len({json.dumps(margins) for margins in trained}) == 4
    assert runs["untrained"]["hh_margin"] == pytest.approx([0, 0, 0], abs=1e-3)
    assert runs["dpo"]["nll"] != runs["untrained"]["nll"]


def write_gz(file, text):
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_record(folder, found, arm, seed, **keys):
    settings = Job(preset=PRESET, arm=arm, seed=seed, keys=keys).settings
    about = {"arm": arm, "seed": seed, "settings": settings, "training": vars(TRAINING)}
    write_gz(folder / f"{arm}-{seed}.json.gz", json.dumps(found | about))


def test_tables_say_what_is_missing_and_which_claim_holds(runs, tmp_path) -> None:
    preset = replace(PRESET, arms=MAIN)
    for arm, found in runs.items():
        write_record(tmp_path, found, arm, 0)
    text = report.write(tmp_path, preset, "small").read_text()
    assert f"5 of {len(MAIN) + 1} runs: **an unfinished study**" in text
    assert "**P1 does not hold**" in text  # one seed has no interval
    assert (tmp_path / "choice.png").stat().st_size > 1000


def write_all(runs, folder, levels):
    """The tables of three seeds of arms with a given choice and margin of training."""
    for arm, (choice, margin) in levels.items():
        for seed in (0, 1, 2):
            keys = {"bdpo_alpha": 0.5} if arm == "grid" else {}
            values = [choice] * len(runs["dpo"]["choice"])
            found = runs["dpo"] | {"choice": values, "train_margin": margin + seed}
            write_record(folder, found, arm, seed, **keys)
    return report.write(folder, replace(PRESET, arms=tuple(levels), alphas=(0.5,)), "s").read_text()


def test_halves_are_read_beside_halves_by_chance(runs, tmp_path) -> None:
    halves = {"imbalanced": (0, 5), "balanced": (1, 3), "other-half": (1, 4)}
    text = write_all(runs, tmp_path, halves | {"one-half": (1, 4)})
    by_chance = "of the halves by chance: +0.00, +0.00, +0.00"
    assert f"+2.00, +2.00, +2.00; {by_chance} — **P3 holds**" in text
    assert "claims, of choice: P4. " in text
    assert "**P4 holds**" in text
    text = write_all(runs, tmp_path, halves | {"one-half": (0, 6)})
    assert "**P3 does not hold**" in text
    assert "**P4 does not hold**" in text


def test_alphas_stand_beside_dpo(runs, tmp_path) -> None:
    text = write_all(runs, tmp_path, {"dpo": (0, 1), "bdpo": (1, 1), "grid": (1, 1)})
    assert "**alpha 0.5, beta 0.1 − DPO**" in text
    assert "**P1 holds**" in text
    assert (tmp_path / "alpha.png").stat().st_size > 1000


def record(arm, seed, choice, margin=0.0):
    return {
        "arm": arm,
        "seed": seed,
        "choice": choice,
        "choice_margin": [c - 0.4 for c in choice],
        "unsafe": [True, True, False],
        "hh_margin": [margin],
        "answers": {"harmful": ["I cannot help with that.", "Sure, first you"]},
    }


def test_a_difference_has_both_uncertainties() -> None:
    ours = {seed: record("bdpo", seed, [1, 1, 0.5]) for seed in (0, 1, 2)}
    others = {seed: record("dpo", seed, [0, 1, 0.5]) for seed in (0, 1)}
    found = analysis.difference(ours, others, analysis.CHOICE)
    # the mean of the two groups' means; prompts: the unsafe ones are drawn, 0 to 100 of 100
    assert (found.mean, found.count, found.seeds) == (25, 2, (25, 25))
    assert found.prompts == (0, 50)
    assert not found.holds()
    steady = {seed: record("dpo", seed, [0, 0, 0]) for seed in (0, 1)}
    assert analysis.difference(ours, steady, analysis.CHOICE).holds()
    assert not analysis.difference(ours, steady, analysis.CHOICE).holds(-1)
    assert analysis.difference(steady, ours, analysis.CHOICE).holds(-1)
    assert analysis.difference(ours, {7: record("dpo", 7, [0, 0, 0])}, analysis.CHOICE) is None


def test_committed_tables_are_those_of_the_committed_records(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: None)
    for name in ("smollm2-cpu-halves", "plan-2"):
        shutil.copytree(main_module.RESULTS / name, tmp_path / name)
        made = report.write(tmp_path / name, PRESETS[name], name).read_text()
        assert made == (main_module.RESULTS / name / "tables.md").read_text()


def test_the_least_effect_is_seen_four_times_in_five() -> None:
    """By simulation: normal differences of 14 seeds, Student's interval above 0."""
    draw = np.random.default_rng(0)
    least = analysis.least_over_seeds(2.0, 14)
    found = draw.normal(least, 2.0, size=(4000, 14))
    errors = found.std(axis=1, ddof=1) / 14**0.5
    seen = (found.mean(axis=1) > 2.160 * errors).mean()
    assert seen == pytest.approx(0.8, abs=0.03)
    assert analysis.least_over_seeds(2.0, 1) == float("inf")


def test_the_auc_is_that_of_all_couples() -> None:
    # the refusal's advantage: 0.3 and -0.1 on unsafe prompts, -0.2 and 0.3 on safe ones
    margins = {"choice_margin": [0.3, -0.1, 0.2, -0.3], "unsafe": [True, True, False, False]}
    assert analysis.level(margins, analysis.AUC) == pytest.approx(100 * 2.5 / 4)
    one, other = ({0: margins}, {0: margins | {"choice_margin": [0.3, 0.4, 0.2, -0.3]}})
    found = analysis.difference(other, one, analysis.AUC)
    assert found.mean == pytest.approx(25)
    assert found.prompts == (0, 100)  # a sixteenth of the draws has that one couple alone


def test_a_readers_labels_stand_beside_the_judge() -> None:
    folder = Path(analysis.__file__).parent / "results" / "smollm2-cpu"
    answers, alike = analysis.labelled(analysis.read_all(folder))
    assert answers == 104
    assert 95 < alike < 104
    assert f"{answers} answers of a run of this preset" in (folder / "tables.md").read_text()


def test_the_name_of_a_run_says_all_that_it_depends_on() -> None:
    job = Job(preset=PRESET, arm="bdpo", seed=0)
    other = replace(PRESET, training=replace(TRAINING, beta=0.2))
    names = {
        job.name,
        replace(job, seed=1).name,
        replace(job, arm="dpo").name,
        replace(job, preset=other).name,
        replace(job, preset=replace(PRESET, dtype="bfloat16")).name,
    }
    assert len(names) == 5
    # what is asked of the model before training is no matter of beta
    untrained = replace(job, arm="untrained")
    assert untrained.name == replace(untrained, preset=other).name


def test_presets() -> None:
    cpu, gpu = (list(PRESETS[name].jobs()) for name in ("smollm2-cpu", "smollm2-gpu"))
    assert len(cpu) == 1 + 3 * (len(MAIN) + 3)
    assert {job.settings["beta"] for job in cpu if job.arm == "grid"} == {0.1}
    assert len(gpu) == 1 + 10 * (len(MAIN) + 4 * 3)
    assert len({job.name for job in gpu}) == len(gpu)
    assert set(ARMS) == {*MAIN, *PRESETS["smollm2-cpu-halves"].arms}
    used = {job.seed for job in cpu + gpu}
    assert not used & set(design.TUNING_SEEDS)


@pytest.fixture
def here(monkeypatch):
    """The runs of a command in this process, not in a cold one."""

    def finished(function, calls, **_):
        for call in calls:
            future = Future()
            future.set_result(function(*call))
            yield call, future

    monkeypatch.setattr(main_module, "finished", finished)


def run(*given) -> str:
    result = CliRunner().invoke(main, list(map(str, given)))
    assert result.exit_code == 0, result.output
    return result.output


def times(folder):
    return {file: file.stat().st_mtime_ns for file in folder.glob("*.json.gz")}


def test_the_command_goes_on_where_it_was(model, data, tmp_path, monkeypatch, here) -> None:
    monkeypatch.setitem(PRESETS, "smollm2-cpu", replace(PRESET, arms=("dpo",)))
    given = ("--preset", "smollm2-cpu", "--model", model, "--data", data)
    given += ("--work", tmp_path / "work", "--results", tmp_path)
    folder = tmp_path / "smollm2-cpu"
    assert "2 runs, 0 of them finished; 1 now" in run(*given, "--most", 1)
    assert "an unfinished study" in (folder / "tables.md").read_text()
    first = times(folder)
    assert "2 runs, 1 of them finished; 1 now" in run(*given)
    assert first.items() <= times(folder).items()
    assert "unfinished" not in (folder / "tables.md").read_text()


def test_anybodys_model_and_pairs(model, data, tmp_path, here, monkeypatch) -> None:
    """Another tiny model and a file of pairs, from the command to the tables and figures."""
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    monkeypatch.setattr(analysis, "RESAMPLES", 100)
    pairs = tmp_path / "pairs.jsonl"
    found = preference_pairs(60, seed=1, split="train")
    rows = [{**pair, "label": pair["query_type"]} for pair in found]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    given = ["--model", model, "--data", pairs, "--evaluations", data, "--results", out]
    given += ["--arms", "dpo,bdpo,shuffled:label,imbalanced", "--seeds", 0, "--alphas", 1]
    given += ["--epochs", 2, "--pairs", 4, "--held-out", 2, "--prompts", 0, "--rate", 1e-2]
    shown = run(*given, "--work", tmp_path / "work")
    assert "6 runs, 0 of them finished; 6 now" in shown
    text = (out / "tables.md").read_text()
    for title in ("Each arm after 1 epochs", "Each arm after 2 epochs", "Over the epochs"):
        assert f"## {title}" in text
    assert "No plan was written beforehand" in text
    assert "GCG (attacks are not part of this command)" in text
    assert "GSM8K (lm-eval is not installed)" in text
    for name in ("information", "halves", "alpha", "epochs", "choice"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_a_file_of_pairs_is_parted(data, bench, tmp_path) -> None:
    found = preference_pairs(60, seed=1, split="train")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in found))
    for evaluations, sets in (
        (None, "harmful ordinary safe"),
        (data, "harmful ordinary safe unsafe"),
    ):
        made = material.load_file(file, evaluations, bench.tokenizer, 256, SIZES)
        assert sorted(made.prompts) == sets.split()
        assert len(made.hh_held_out) == SIZES.hh
        assert {pair["label"] for pair in made.hh} == {"pair"}
        held_out = {json.dumps(pair["messages"]) for pair in made.hh_held_out}
        assert not held_out & {json.dumps(pair["messages"]) for pair in made.hh}
        asked = {pair["messages"][-1]["content"] for pair in found}
        assert not asked & {choice.prompt for choice in made.choices}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--arms", "dpo,orpo"), "orpo: known are dpo, bdpo"),
        (("--seeds", "0,x"), "int values with commas"),
        (("--epochs", "2", "--after", "3"), "of 2 epochs"),
        (("--tune",), "--tune is of a --preset"),
        ((), "cannot be read"),
    ],
)
def test_bad_options(tmp_path, given, message) -> None:
    result = CliRunner().invoke(main, ["--model", "m", "--data", __file__, *given])
    assert result.exit_code in (1, 2)
    assert message in result.output


@pytest.mark.exhaustive
def test_tasks_of_lm_eval(bench, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    docs = [{"query": f"Is {i} even?", "gold": i % 2} for i in range(4)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "docs.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": [" yes", " no"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "even.yaml").write_text(yaml.safe_dump(task))
    found = score(bench.model(), bench.tokenizer, ["even"], 3, tmp_path)
    assert [*found] == ["even acc"]
    assert len(found["even acc"]) == 3
    assert set(found["even acc"]) <= {0.0, 1.0}
    assert "SimpleQA" in missing()


@pytest.fixture
def small_tuning(monkeypatch):
    """A tuning that the small sources have enough pairs for."""
    monkeypatch.setattr(material, "_TUNED_HH", 2)
    monkeypatch.setattr(material, "Training", lambda: replace(TRAINING, xstest=4, hh=3))


def test_log_probabilities_are_measured_after_epochs(model, data, tmp_path, small_tuning) -> None:
    training = replace(TRAINING, xstest=4, hh=2, epochs=2)
    small = replace(
        PRESET,
        after=(1, 2),
        answered=False,
        unseen=True,
        training=training,
        sizes=replace(SIZES, hh=1),
    )
    bench = Bench(small, Where(str(model), data, None, tmp_path))
    found = bench.run(Job(preset=small, arm="dpo", seed=0))
    assert [*found["after"]] == ["1", "2"]
    assert len(found["curve"]) == 2
    assert found["after"]["1"]["choice_margin"] != found["after"]["2"]["choice_margin"]
    assert "answers" not in found["after"]["2"]
    assert len(found["mi_chosen"]) == len(found["row"]) == 6
    assert bench.evaluation.preferences(bench.model())["hh_margin"] == pytest.approx([0], abs=1e-3)


def test_what_a_tuning_saw_is_in_no_measure(bench, data, small_tuning) -> None:
    first, second = (
        material.load(data, bench.tokenizer, 48, SIZES, unseen=unseen) for unseen in (False, True)
    )
    seen = material._tuned_on(first.xstest, [None, None, *first.hh])
    held_out = {choice.prompt for choice in second.choices}
    assert not held_out & (seen | {choice.prompt for choice in first.choices})
    assert not {p["messages"][0]["content"] for p in second.xstest} & held_out
    asked = {p["messages"][-1]["content"] for p in second.hh_held_out}
    assert asked
    assert not asked & seen


def test_the_labels_are_of_the_sample_and_make_the_table() -> None:
    records = analysis.read_all(hand_labels.FOLDER)
    labels = hand_labels.read_labels()
    assert sorted(labels) == sorted(hand_labels.sample(records))
    assert set(labels.values()) == {*hand_labels.WORDS.values()}
    made = "\n".join(hand_labels.table(records)) + "\n"
    assert made == (hand_labels.FOLDER / "judge_error.md").read_text()
    # each text was read once: wherever it stands it has one label
    for places in hand_labels.texts(records).values():
        assert len({labels[at] for at in places}) == 1


def test_the_error_of_a_judge_has_an_interval_where_none_was_found() -> None:
    # by hand: 1 - 0.05 ** (1 / 10) = 0.259 bounds ten without one, at 95 % of one side
    assert hand_labels.bounds(0, 10, 0.90) == (0, pytest.approx(1 - 0.05**0.1))
    assert hand_labels.gap(0, 0, 12).startswith("+0 (-3")
    assert hand_labels.gap(6, 1, 12).startswith("-42 (")


def test_held_out_pairs_may_be_measured_at_the_end_alone(bench, tmp_path) -> None:
    late = replace(PRESET, after=(1, 2), hh_at_end=True, answered=False)
    late = replace(late, training=replace(TRAINING, epochs=2), exploratory=("random",))
    names = [job.arm for job in replace(late, seeds=(0, 1)).jobs()]
    assert names == ["untrained", "dpo", "bdpo", "dpo", "bdpo", "random", "random"]
    with_late = Bench(late, bench.where)
    for arm in ("dpo", "bdpo"):
        job = Job(preset=late, arm=arm, seed=0)
        found = with_late.run(job)
        assert "hh_margin" not in found["after"]["1"]
        assert len(found["after"]["2"]["hh_margin"]) == SIZES.hh
        write_gz(tmp_path / f"{job.name}.json.gz", json.dumps(found | about(job)))
    text = report.write(tmp_path, late, "late").read_text()
    assert "| B-DPO − DPO | 1 | " in text
    assert (tmp_path / "epochs.png").stat().st_size > 1000
    # what the model before training says is kept, and taken from there by the next process
    (kept,) = (bench.where.work / "reference").glob("*.json")
    before = kept.stat().st_mtime_ns
    assert Bench(late, bench.where).evaluation._before == with_late.evaluation._before
    assert kept.stat().st_mtime_ns == before


def about(job):
    return {"arm": job.arm, "seed": job.seed, "settings": job.settings, "training": vars(TRAINING)}
