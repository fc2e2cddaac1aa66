"""Which rows of a dataset are trained on, and which datasets a trainer has prepared itself."""

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from bdpo_plugin import BDPOError
from bdpo_plugin.data.pairs import Pair, Side
from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.training.datasets import (
    ReadyDatasets,
    Tokenised,
    description_of,
    digest,
    drop_reserved,
    is_reserved,
    peek,
    usable_rows,
)

TOKENIZER = build_tokenizer()


def pair(chosen, rejected, prompt=(5, 6)):
    ids = [np.array(part, np.int64) for part in (prompt, chosen, rejected)]
    return Pair(Side(ids[0], ids[1]), Side(ids[0], ids[2]))


PAIRS = [pair([40, 41], [42]), pair([], [43]), pair([44], [44]), pair([45], [46])]
DATA = Dataset.from_dict({"topic": ["a", "b", "c", "d"]})


def usable(pairs=PAIRS, data=DATA, **options):
    lengths = [(len(p.chosen.completion_ids), len(p.rejected.completion_ids)) for p in pairs]
    tokenised = Tokenised(pairs, lengths, [], [10 + i for i in range(len(pairs))])
    given = {"tokenizer": TOKENIZER, "control_column": None, "asked": (), "main": True}
    return usable_rows(data, tokenised, "train", **given | options)


def test_rows_that_cannot_be_trained_on_go_with_all_that_is_theirs(capsys):
    found = usable(control_column="topic", asked=["topic"])
    assert found.rows == [10, 13]
    assert found.groups == found.columns["topic"] == found.dataset["topic"][:] == ["a", "d"]
    assert [p.chosen.completion_ids.tolist() for p in found.pairs] == [[40, 41], [45]]
    told = " ".join(capsys.readouterr().out.split())
    assert "a response is empty" in told
    assert "rows 11" in told
    usable(main=False)
    assert not capsys.readouterr().out


def test_what_is_missing_is_named():
    with pytest.raises(BDPOError, match="No pair of the train data can be trained on"):
        usable(PAIRS[1:3], DATA.select([1, 2]))
    with pytest.raises(BDPOError, match=r"asks for tone, which the train data does not have"):
        usable(asked=["tone"])
    with pytest.raises(BDPOError, match="`bdpo_control: shuffled:tone`: the train data has no"):
        usable(control_column="tone")


def test_a_digest_is_of_content_and_order():
    same = [pair([40, 41], [42]), *PAIRS[1:]]
    others = [PAIRS[::-1], PAIRS[:3], [pair([40], [41, 42]), *PAIRS[1:]]]
    assert digest(PAIRS) == digest(same)
    assert len({digest(PAIRS), *map(digest, others)}) == 4
    assert description_of(PAIRS, TOKENIZER, None) == {"training pairs": digest(PAIRS)}


def test_a_dataset_is_ready_by_content_and_a_stream_by_identity():
    ready = ReadyDatasets()
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    other = IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    assert ready.add(DATA) is DATA
    assert ready.add(stream) is stream
    assert DATA in ready
    assert stream in ready
    assert DATA.select([0]) not in ready
    assert other not in ready


def test_columns_named_as_results_go(capsys):
    named = DATA.add_column("bdpo_scale", [1.0] * 4).add_column("ref_chosen_logps", [0.0] * 4)
    assert drop_reserved(named, "train", main=True).column_names == ["topic"]
    assert "bdpo_scale, ref_chosen_logps" in capsys.readouterr().out
    assert drop_reserved(DATA, "train", main=True) is DATA
    assert not is_reserved("bdpo_file_row")


def test_the_first_rows_of_a_stream():
    stream = IterableDataset.from_generator(lambda: ({"a": i, "b": 0} for i in range(300)))
    rows = peek(stream, "train", ["a"])
    assert rows.column_names == ["a"]
    assert rows["a"][:] == list(range(256))
    with pytest.raises(BDPOError, match="No pair of the train data, a stream"):
        peek(stream.filter(lambda row: False), "train", ["a"])
