"""`bdpo mi` without a host's configuration, its page in a browser, and what it refuses."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from click import ClickException
from commandline import bdpo
from datasets import Dataset, load_dataset
from guarded import nothing_but
from test_cli_pictures import assert_drawn

from bdpo_plugin.cli.mi import write_split
from bdpo_plugin.cli.pair_labels import label_colours
from bdpo_plugin.cli.subset import write_subset
from bdpo_plugin.data.recorded_sources import Source
from bdpo_plugin.demo.tiny import preference_pairs, write
from bdpo_plugin.inspection.scored_pairs import Place, Scored

HOSTILE = (
    "</script><img src=x onerror=\"document.title='caught'\"><script>document.title='caught'"
    "</script><!-- \u2028 ${document.title='caught'} \x1b[2J & &lt;b&gt;"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and 16 pairs with hostile texts in the first and a label of their own."""
    folder = write(tmp_path_factory.mktemp("mi"), steps=0, hidden_size=32, layers=1, progress=False)
    rows = [{**pair, "number": i} for i, pair in enumerate(preference_pairs(16))]
    rows[0]["messages"][0]["content"] += HOSTILE
    rows[0]["chosen"]["content"] = HOSTILE
    rows[0]["rejected"]["content"] += HOSTILE
    for row in rows[:4]:
        row["query_type"] = HOSTILE
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def made(folder):
    """The command's folder, what it printed as JSON, and the rows that it was given."""
    output = folder / "out"
    with pytest.MonkeyPatch.context() as patch, nothing_but(folder, output, monkeypatch=patch):
        code, shown = bdpo(
            *("mi", "--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl")),
            *("--output", str(output), "--json", "--split", "imbalanced", "--fraction", "0.25"),
        )
    assert code == 0, shown
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return output, json.loads(shown[shown.index("{") :]), rows


def scores(output):
    return pq.read_table(output / "bdpo" / "reference_scores.parquet").to_pydict()


def test_what_it_prints_is_what_the_scores_say(made) -> None:
    output, result, rows = made
    found = scores(output)
    pairs = list(zip(found["mi_chosen"], found["mi_rejected"], strict=True))
    assert result["pairs"] == len(pairs) == len(rows)
    assert result["chosen higher"] == sum(a > b for a, b in pairs) / len(pairs)
    assert result["rejected higher"] == sum(a < b for a, b in pairs) / len(pairs)
    assert result["mean imbalance"] == pytest.approx(sum(abs(a - b) for a, b in pairs) / len(pairs))
    assert_drawn(output / "mi.png")


def test_the_subset_has_the_most_imbalanced_rows_as_they_were(made, folder) -> None:
    output, result, _ = made
    (path,) = result["imbalanced"]
    found = scores(output)
    apart = [abs(a - b) for a, b in zip(found["mi_chosen"], found["mi_rejected"], strict=True)]
    wanted = sorted(range(16), key=lambda i: -apart[i])[:4]
    assert path == str(output / "pairs-imbalanced.jsonl")
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    assert (output / "pairs-imbalanced.jsonl").read_text().splitlines() == [
        lines[i] for i in sorted(wanted)
    ]


class Page(HTMLParser):
    """The elements of a page, and the texts of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.texts, self._at = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._at = len(self.elements)
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._at = None

    def handle_data(self, data):
        if self._at is not None:
            self.texts[self._at] = self.texts.get(self._at, "") + data


def test_the_page_is_one_file_in_which_texts_are_data(made) -> None:
    output, _, rows = made
    text = (output / "mi.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags == ["html", "head", *["meta"] * 3, "title", "style", "body", "h1", *["script"] * 2]
    attributes = {name for _, of in page.elements for name in of}
    assert attributes == {"lang", "charset", "http-equiv", "content", "name", "type", "id"}
    assert "http:" not in text
    assert "https:" not in text

    policy = page.elements[3][1]["content"]
    assert policy.startswith("default-src 'none'; ")
    for at in (6, 10):  # the style and the script
        digest = base64.b64encode(hashlib.sha256(page.texts[at].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy

    data = json.loads(page.texts[9])
    assert data["label"] == "query_type"
    assert len(data["notes"]) == 3  # 16 pairs are too few to explain anything
    assert data["colours"].keys() == {pair["label"] for pair in data["pairs"]}
    assert {pair["label"] for pair in data["pairs"]} == {
        "safe", "unsafe", HOSTILE.replace("\u2028", "\\u2028").replace("\x1b", "\\x1b")
    }  # fmt: skip
    found = scores(output)
    for pair, row in zip(data["pairs"], found["row"], strict=True):
        assert pair["row"] == row
        assert pair["numbers"][0] == pytest.approx(found["mi_chosen"][row], abs=1e-5)
    first = next(pair for pair in data["pairs"] if pair["row"] == 0)
    shown = HOSTILE.replace("\u2028", "\\u2028").replace("\x1b", "\\x1b")
    assert first["chosen"] == shown
    assert first["query"] == rows[0]["messages"][0]["content"].replace(HOSTILE, shown)
    assert first["prompt"].count(shown) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_page_in_a_browser(made, tmp_path) -> None:
    output, _, _ = made
    found = scores(output)
    apart = [abs(a - b) for a, b in zip(found["mi_chosen"], found["mi_rejected"], strict=True)]
    column = "[...document.querySelectorAll('#list button')].map(b => +b.children[3].textContent)"

    with Browser(output / "mi.html", tmp_path) as page:
        assert page.evaluate("document.title").startswith(str(output.parent))  # the model's name
        assert page.evaluate("document.querySelectorAll('img, iframe, a, b').length") == 0
        assert page.evaluate(column) == pytest.approx(sorted(apart, reverse=True), abs=1e-3)
        page.evaluate(
            "sort.value = 'least imbalanced first'; sort.dispatchEvent(new Event('change'))"
        )
        assert page.evaluate(column) == pytest.approx(sorted(apart), abs=1e-3)
        # every pair is shown once selected, the hostile one among them
        page.evaluate("for (const i of pairs.keys()) document.querySelectorAll('#list button')[i]"
                      ".click()")  # fmt: skip
        page.evaluate("select(pairs.find(pair => pair.row === 0))")
        assert "onerror" in page.evaluate("document.getElementById('pair').textContent")
        assert page.evaluate("document.querySelectorAll('img, iframe, a, b').length") == 0
        # a click on a point selects its pair
        page.evaluate(
            "const [px, py, wanted] = points[3], at = canvas.getBoundingClientRect();"
            "const where = {clientX: at.x + px, clientY: at.y + py};"
            "canvas.dispatchEvent(new MouseEvent('click', where))"
        )
        assert (
            page.evaluate("Math.hypot(...[0, 1].map(i => mi(selected, i) - mi(wanted, i)))") < 1e-2
        )
        # and says what it is while the mouse is there
        page.evaluate("canvas.dispatchEvent(new MouseEvent('mousemove', where))")
        assert page.evaluate(
            "!tip.hidden && tip.textContent.includes(`chosen ${fixed(mi(wanted, 0))}`)"
        )
        page.evaluate("canvas.dispatchEvent(new MouseEvent('mouseleave'))")
        assert page.evaluate("tip.hidden")
        assert "Do not conclude" in page.evaluate("document.getElementById('notes').textContent")
        unlabelled = page.evaluate("pairs.filter(pair => pair.label !== labels[0]).length")
        for left in (unlabelled, 16):
            page.evaluate("document.querySelector('input[type=checkbox]').click()")
            assert page.evaluate("document.querySelectorAll('#list button').length") == left
        assert 0 < unlabelled < 16
        # words are found wherever they are, and Escape shows all pairs again
        page.evaluate("search.value = 'ONERROR caught'; search.dispatchEvent(new Event('input'))")
        assert page.evaluate("visible.map(pair => pair.row)") == [0]
        page.evaluate("const press = key => document.dispatchEvent(new KeyboardEvent('keydown', "
                      "{key})); press('Escape')")  # fmt: skip
        assert page.evaluate("[visible.length, search.value]") == [16, ""]
        page.evaluate("press('ArrowDown'); press('ArrowDown'); press('k')")
        assert page.evaluate("visible.indexOf(selected) - visible.findIndex(p => p.row === 0)") == 1
        page.evaluate("for (const _ of pairs) press('j')")
        assert page.evaluate("visible.indexOf(selected)") == 15
        page.evaluate("press('/')")
        assert page.evaluate("document.activeElement.id") == "search"
        drawn = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        assert page.evaluate(f"{drawn}.some((value, i) => i % 4 === 0 && value === 0xd5)")
        assert page.evaluate("document.title") != "caught"
        assert page.errors == []


def test_the_table(folder, made) -> None:
    code, shown = bdpo(
        *("mi", "--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl")),
        *("--output", str(folder / "out"), "--top", "16"),
    )
    assert code == 0
    assert "\x1b[2J" not in shown
    assert "query_type" in shown
    assert "rejected understood better" in shown
    title, numbers = shown.index("The most imbalanced pairs"), []
    for line in shown[title:].splitlines():
        if cells := re.match(r"│ +(-?\d\.\d{3}) │ +(-?\d\.\d{3}) │", line):
            numbers.append(abs(float(cells[1]) - float(cells[2])))
    assert len(numbers) == 16
    assert numbers == sorted(numbers, reverse=True) or numbers == pytest.approx(
        sorted(numbers, reverse=True), abs=2e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a CONFIG, or --model and --dataset"),
        (["--model", "m"], "Give a CONFIG, or --model and --dataset"),
        (["--model", "m", "--dataset", "d", "--split", "balanced"], "go together"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message) -> None:
    code, shown = bdpo("mi", *arguments)
    assert code == 2
    assert message in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "is no YAML"),
        ("- a", "neither `base_model` (Axolotl) nor `model_name_or_path` (LLaMA-Factory, TRL)"),
        ("base_model: a\nmodel_name_or_path: b", "keys of two hosts"),
        ("base_model: a\nrl: grpo", "`rl: grpo`: the mutual information is that of preference"),
        ("model_name_or_path: a\nstage: sft", "Write `stage: dpo`"),
    ],
)
def test_configurations_of_nothing_that_could_be_scored(text, message, tmp_path) -> None:
    (tmp_path / "config.yml").write_text(text)
    code, shown = bdpo("mi", str(tmp_path / "config.yml"))
    assert code == 1
    assert message in shown


def test_a_label_keeps_its_colour_in_other_data() -> None:
    names = ["safe", "unsafe", "violence", "privacy", "fraud"]
    alone = label_colours(names)
    assert alone == label_colours(names[::-1] * 3 + ["fraud"] * 20)
    assert len(set(alone.values())) == len(names)
    assert label_colours(["unsafe"]) == {"unsafe": alone["unsafe"]}
    assert label_colours(["safe", "a"])["safe"] == alone["safe"]
    many = [f"label {number}" for number in range(9)] * 2 + ["label 8"]
    assert list(label_colours(many)) == [*(f"label {number}" for number in range(6)), "label 8"]
    assert label_colours(None) == {}


def test_more_labels_than_colours(folder, tmp_path) -> None:
    code, shown = bdpo(
        *("mi", "--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl")),
        *("--output", str(tmp_path), "--label", "number", "--top", "1"),
    )
    assert code == 0, shown
    assert "number" in shown
    assert_drawn(tmp_path / "mi.png")
    text = (tmp_path / "mi.html").read_text(encoding="utf-8")
    assert {pair["label"] for pair in json.loads(Page(text).texts[9])["pairs"]} == {
        str(number) for number in range(16)
    }


def test_a_split_of_pairs_whose_rows_are_not_known() -> None:
    table = pa.table({"mi_chosen": [0.0, 1.0], "mi_rejected": [0.5, 0.0]})
    scored = Scored(table, [], [Place(0, 0), None], [Source(Dataset.from_list(ROWS[:2]), None)])
    assert scored.column("a") == [0, None]
    with pytest.raises(ClickException, match="1 of 2 pairs were made of is not known"):
        write_split(scored, np.array([0.5, 1.0]), "imbalanced", 1.0, Path())


def test_a_label_that_is_not_there(folder) -> None:
    code, shown = bdpo(
        *("mi", "--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl")),
        *("--output", str(folder / "out"), "--label", "nonesuch"),
    )
    assert code == 1
    assert "no such column, only chosen, messages, number, query_type, rejected" in shown


ROWS = [{"a": i, "b": {"c": [i]}, "text": "é\n"} for i in range(5)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_subset_is_in_the_format_of_its_file(kind, tmp_path) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(f"{json.dumps(row)}\n\n" for row in ROWS))
    loader = "parquet" if kind == "parquet" else "json"
    whole = load_dataset(loader, data_files=str(path), split="train")
    made = write_subset(Source(whole, None, path), [3, 1], tmp_path, "part")
    assert made == tmp_path / f"part.{kind}"
    assert load_dataset(loader, data_files=str(made), split="train").to_list() == [ROWS[1], ROWS[3]]
    if kind == "json":
        assert json.loads(made.read_text()) == [ROWS[1], ROWS[3]]
    if kind == "jsonl":
        assert made.read_text().splitlines() == [json.dumps(ROWS[i]) for i in (1, 3)]

    # a part of a file: no row of it is taken for another
    part = load_dataset(loader, data_files=str(path), split="train[2:]")
    made = write_subset(Source(part, None, path), [0, 1], tmp_path, "of-part")
    found = load_dataset(
        "parquet" if made.suffix == ".parquet" else "json", data_files=str(made), split="train"
    )
    assert found.to_list() == ROWS[2:4]
