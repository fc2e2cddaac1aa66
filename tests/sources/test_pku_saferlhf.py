"""PKU-SafeRLHF's rows as pairs."""

from bdpo_plugin.sources.pku_saferlhf import COLUMNS, choose, sort
from bdpo_plugin.sources.selection import select


def pku_row(prompt="How?", texts=("Yes.", "No."), safe=(True, False), better=0, safer=0):
    return dict(zip(COLUMNS, (prompt, *texts, *safe, better, safer), strict=True))


def test_which_response_is_chosen():
    def chosen(**fields):
        kind, pair = choose(pku_row(**fields))
        return kind, pair and pair["chosen"]["content"]

    assert chosen() == ("unsafe", "Yes.")
    assert chosen(safe=(False, True), safer=1) == ("unsafe", "No.")
    assert chosen(safe=(False, True), safer=1, better=0) == ("unsafe", "No.")
    assert chosen(safe=(True, True), better=1, safer=0) == ("safe", "No.")
    assert chosen(safe=(False, False)) == ("both responses unsafe", None)
    assert chosen(safer=1) == ("labels contradict each other", None)
    assert chosen(safer=-1) == ("labels contradict each other", None)
    assert chosen(texts=("Yes.", " Yes. ")) == ("identical responses", None)
    assert chosen(texts=("Yes.", None)) == ("prompt or response empty", None)
    assert chosen(prompt=" ") == ("prompt or response empty", None)
    _, pair = choose(pku_row())
    assert pair["messages"] == [{"role": "user", "content": "How?"}]
    assert pair["rejected"] == {"role": "assistant", "content": "No."}
    assert pair["label"] == "unsafe"
    assert choose(pku_row(safe=(True, True)))[1]["label"] == "safe"


def test_half_of_each_kind_and_every_row_counted():
    rows = [pku_row(f"unsafe {i % 8}") for i in range(10)]
    rows += [pku_row(f"safe {i}", safe=(True, True)) for i in range(2)]
    rows += [pku_row("bad", safe=(False, False))] * 3
    sizes = {"unsafe": 3, "safe": 3}
    pairs, counts = select(sort(rows), sizes)
    assert len(pairs) == 5
    assert counts == {
        "unsafe": 3,
        "unsafe, not needed": 5,
        "safe": 2,
        "duplicate prompt": 2,
        "both responses unsafe": 3,
    }
    assert select(sort(rows), sizes) == (pairs, counts)
    prompts = [pair["messages"][0]["content"] for pair in pairs]
    assert len(set(prompts)) == 5
