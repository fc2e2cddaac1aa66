"""Token ids read from Arrow are those of the rows, however the dataset holds them."""

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from bdpo_plugin.data.token_ids import token_rows

ROWS = [{"a": [1, 2], "b": []}, {"a": [], "b": [3]}, {"a": [4], "b": [5, 6, 7]}]


@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("change", ["none", "selected", "joined", "formatted"])
def test_the_ids_are_those_of_the_rows(kind, change):
    features = Features({"a": List(Value(kind)), "b": List(Value(kind)), "c": Value("string")})
    rows = [row | {"c": "text"} for row in ROWS * 700]  # more than a block
    dataset = Dataset.from_list(rows, features=features)
    if change == "selected":
        dataset = dataset.select([5, 0, 4, 1000, 2])
    elif change == "joined":
        dataset = concatenate_datasets([dataset, dataset.select(range(3, 9))])
    elif change == "formatted":
        dataset = dataset.with_format("torch")
    found = list(token_rows(dataset, ("b", "a")))
    wanted = [(row["b"], row["a"]) for row in dataset.with_format(None)]
    assert [tuple(ids.tolist() for ids in row) for row in found] == wanted
    assert {ids.dtype for row in found for ids in row} == {np.dtype(np.int64)}


def test_a_column_without_any_id():
    found = list(token_rows(Dataset.from_list([{"a": [], "b": [1]}, {"a": [], "b": [2]}]), ("a",)))
    assert [len(ids) for (ids,) in found] == [0, 0]
