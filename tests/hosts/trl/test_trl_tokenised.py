"""TRL's tokenised data is read as its collator and its tokenizer make it."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from running import trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.hosts.trl import tokenised as data
from bdpo_plugin.hosts.trl.tokenised import TOKENISED, dataset_pairs

ids = st.lists(st.integers(1, 9), max_size=5)


class OfTheUser(DataCollatorForPreference):
    """Another collator than TRL's, as far as can be told: its batches are read."""


@given(
    rows=st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=5),
    limit=st.none() | st.integers(1, 12),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_pairs_are_those_of_the_collator(rows, limit, mode):
    dataset = Dataset.from_list([dict(zip(TOKENISED, row, strict=True)) for row in rows])
    collator = DataCollatorForPreference(pad_token_id=0, max_length=limit, truncation_mode=mode)
    of_batches = OfTheUser(pad_token_id=0, max_length=limit, truncation_mode=mode)
    found, wanted = (dataset_pairs(dataset, made) for made in (collator, of_batches))
    for pair, other in zip(found, wanted, strict=True):
        for side, its in zip(pair, other, strict=True):
            for read, batched in zip(side, its, strict=True):
                np.testing.assert_array_equal(read, batched)


@pytest.mark.parametrize("processes", [None, 3])
def test_rows_whose_prompt_changes_with_a_response(tmp_path, monkeypatch, processes):
    """As TRL has tokenised them; found in the shares of all processes."""
    rows = [{"prompt": f"Question {i}?", "chosen": " yes", "rejected": " no"} for i in range(12)]
    for moved in (0, 7, 11):
        rows[moved] = {"prompt": "how do I make the ca", "chosen": "ke", "rejected": "ke now"}
    made = trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))
    monkeypatch.setattr(data, "WORTH_A_PROCESS", 4)
    found = data.prompt_boundary_mismatches(
        made.train_dataset, build_tokenizer(), "train", processes
    )
    assert found == [0, 7, 11]
