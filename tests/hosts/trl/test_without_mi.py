"""Where every weight is 1 the mutual information is not measured: no response is run after the null
prompt, and nothing that a run leaves behind or tells has it."""

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from running import history, trainer

from bdpo_plugin.cli import main
from bdpo_plugin.data.recorded_sources import recording_sources
from bdpo_plugin.reference import scoring


@pytest.fixture
def prompts(monkeypatch):
    """The prompts after which responses are run under the reference."""
    queue, seen = scoring._queue, []

    def noted(jobs, *args, **kwargs):
        for job in jobs:
            seen.extend(tuple(p) for p in (job.prompt_ids, job.null_prompt_ids) if p is not None)
        return queue(jobs, *args, **kwargs)

    monkeypatch.setattr(scoring, "_queue", noted)
    return seen


def null_of(made):
    return tuple(made.scorer.null_prompt.ids)


@pytest.mark.parametrize("estimator", ["pointwise", "expected"])
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "stepwise"])
@pytest.mark.parametrize(
    "off", [{"bdpo_alpha": 0}, {"bdpo_balance": False, "bdpo_scaling": False}], ids="-".join
)
def test_the_null_prompt_is_not_run(tmp_path, prompts, capsys, off, precompute, estimator):
    keys = {"bdpo_precompute": precompute, "bdpo_mi_estimator": estimator}
    made = trainer(output_dir=tmp_path, max_steps=2, **keys, **off)
    made.train()
    assert prompts
    assert null_of(made) not in prompts
    assert not any("bdpo/imbalance" in entry for entry in made.state.log_history)
    assert history(made, "bdpo/scale") == [1, 1]
    if precompute:
        table = pq.read_table(tmp_path / "bdpo" / "reference_scores.parquet")
        assert not {"mi_chosen", "mi_rejected"} & {*table.column_names}
        assert set(table["weight_chosen"].to_pylist()) == {1}
        assert "not measured, as no weight depends on it" in " ".join(
            capsys.readouterr().out.split()
        )


@pytest.mark.parametrize(
    "asked", [{"bdpo_alpha": 0, "bdpo_control": "swapped"}, {"weigh": True}, {"watched": True}]
)
def test_it_is_where_something_reads_it(tmp_path, prompts, asked):
    if asked.pop("weigh", False):
        asked = {"weigh": lambda *mi: (*mi, mi[0] * 0 + 1), "bdpo_alpha": 0}
    if asked.pop("watched", False):  # as `bdpo mi` does
        with recording_sources():
            made = trainer(output_dir=tmp_path, bdpo_alpha=0)
    else:
        made = trainer(output_dir=tmp_path, **asked)
    made.get_train_dataloader()
    assert null_of(made) in prompts


def test_a_later_run_that_weighs_measures_what_is_missing(tmp_path, prompts):
    keys = {"bdpo_cache_dir": str(tmp_path / "scores")}
    trainer(output_dir=tmp_path / "dpo", bdpo_alpha=0, **keys).get_train_dataloader()
    del prompts[:]
    made = trainer(output_dir=tmp_path / "bdpo", **keys)
    made.get_train_dataloader()
    assert {null_of(made)} == {p for p in prompts if p == null_of(made)}
    table = pq.read_table(tmp_path / "bdpo" / "bdpo" / "reference_scores.parquet")
    assert "mi_chosen" in table.column_names


def test_it_is_drawn_without(tmp_path):
    made = trainer(output_dir=tmp_path, bdpo_alpha=0, max_steps=2)
    made.train()
    made.save_state()
    found = CliRunner().invoke(main, ["plot", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "curves.png" in found.output
    assert "was not measured" in found.output
    found = CliRunner().invoke(main, ["compare", str(tmp_path), str(tmp_path)])
    assert found.exit_code == 0, found.output
