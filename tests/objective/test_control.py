"""Controls: whose mutual information weighs a pair, and that the run says so."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import history, pairs, scores, trainer

from bdpo_plugin import BDPOError, BDPOSettings
from bdpo_plugin.objective.control import controlled

SIZES = st.lists(st.integers(0, 3), min_size=2, max_size=30)


def places(control, groups, seed=0):
    """For each pair, whose values it got, and whether they are the wrong way round."""
    numbers = torch.arange(len(groups), dtype=torch.float32)
    chosen, rejected = controlled(control, numbers, numbers + 0.5, seed=seed, groups=groups)
    swapped = chosen > rejected
    return torch.where(swapped, rejected, chosen).long().tolist(), swapped.tolist()


@given(SIZES, st.integers(0, 5))
def test_no_pair_keeps_its_own_and_each_is_given_once(groups, seed) -> None:
    for control in ("shuffled", "random"):
        given_to, _ = places(control, groups, seed)
        assert sorted(given_to) == list(range(len(groups)))
        assert all(place != of for place, of in enumerate(given_to))


@given(SIZES, st.integers(0, 5))
def test_within_groups_but_for_those_that_are_alone(groups, seed) -> None:
    given_to, _ = places("shuffled", groups, seed)
    sizes = Counter(groups)
    alone = [group for group, size in sizes.items() if size == 1]
    for place, of in enumerate(given_to):
        if groups[place] not in alone and groups[of] not in alone:
            assert groups[place] == groups[of]
    crossed = sum(groups[place] != groups[of] for place, of in enumerate(given_to))
    assert crossed <= max(len(alone), 2 * (len(alone) == 1))


def test_swapped_random_and_the_seed() -> None:
    mi = torch.randn(400), torch.randn(400)
    assert controlled("swapped", *mi, seed=0) == (mi[1], mi[0])
    order, _ = places("shuffled", [0] * 400)
    same, swapped = places("random", [0] * 400)
    assert same == order
    assert 150 < sum(swapped) < 250
    assert places("shuffled", [0] * 400, seed=1)[0] != order


def test_one_pair_cannot_be_shuffled() -> None:
    one = torch.zeros(1)
    with pytest.raises(BDPOError, match="two at least"):
        controlled("shuffled", one, one, seed=0)


@pytest.mark.parametrize("value", ["Shuffled", "shuffled:", "swapped:kind", "", 1, True])
def test_what_is_no_control(value) -> None:
    with pytest.raises(BDPOError, match=r"`bdpo_control: .*'shuffled:COLUMN'"):
        BDPOSettings(control=value)


@pytest.mark.parametrize("control", ["shuffled", "shuffled:kind", "random"])
def test_a_shuffle_needs_the_whole_dataset(control) -> None:
    with pytest.raises(BDPOError, match="Set `bdpo_precompute: true`"):
        BDPOSettings(control=control, precompute=False)
    BDPOSettings(control="swapped", precompute=False)


def triples(saved):
    names = ("weight_chosen", "weight_rejected", "scale")
    return list(zip(*(saved[name] for name in names), strict=True))


def test_a_run_and_its_shuffled_control(tmp_path, capsys) -> None:
    trainer(output_dir=tmp_path / "bdpo", seed=3)
    assert "CONTROL" not in capsys.readouterr().out
    made = trainer(output_dir=tmp_path / "control", seed=3, bdpo_control="shuffled")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "24: 0 scored now, 24 reused" in out
    assert "This is not B-DPO but its control" in out
    own, control = scores(tmp_path / "bdpo"), scores(tmp_path / "control")
    assert control["mi_chosen"] == own["mi_chosen"]
    ours, theirs = triples(own), triples(control)
    # the last bit of a softmax depends on where in the tensor it is
    assert np.array(sorted(theirs)) == pytest.approx(np.array(sorted(ours)), rel=1e-6)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))
    file = pq.read_schema(tmp_path / "control/bdpo/reference_scores.parquet")
    assert file.metadata[b"bdpo_control"] == b"shuffled"

    made.train()
    assert history(made, "bdpo/control") == [1.0] * 4
    made.create_model_card()
    card = Path(made.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert card.count("This is not B-DPO but its control") == 1


def test_shuffled_within_a_column_which_has_to_be_there(tmp_path) -> None:
    data = pairs()
    kinds = [str(row % 3) for row in range(len(data))]
    data = data.add_column("kind", kinds)
    made = trainer(output_dir=tmp_path / "run", dataset=data, bdpo_control="shuffled:kind")
    saved = scores(tmp_path / "run")
    assert saved["control_group"] == [kinds[row] for row in saved["row"]]
    trainer(output_dir=tmp_path / "bdpo", dataset=data)
    own = triples(scores(tmp_path / "bdpo"))
    for kind in set(kinds):
        of_kind = [row for row, other in enumerate(saved["control_group"]) if other == kind]
        shuffled = triples(saved)
        theirs, ours = (sorted(of[row] for row in of_kind) for of in (shuffled, own))
        assert np.array(theirs) == pytest.approx(np.array(ours), rel=1e-6)  # as above
    assert made.settings.control_column == "kind"
    with pytest.raises(BDPOError, match="the train data has no column `sort`, only"):
        trainer(output_dir=tmp_path / "none", dataset=data, bdpo_control="shuffled:sort")


def test_swapped_in_each_step(tmp_path) -> None:
    same = {"bdpo_precompute": False, "data_seed": 1}
    one = trainer(output_dir=tmp_path / "bdpo", **same)
    other = trainer(output_dir=tmp_path / "control", bdpo_control="swapped", **same)
    for made in (one, other):
        made.train()
    assert history(one, "bdpo/weight_chosen") == pytest.approx(
        history(other, "bdpo/weight_rejected")
    )
    assert "bdpo/control" not in one.state.log_history[0]
