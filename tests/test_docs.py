"""README, docs/, CHANGELOG and the recipes say what the code does."""

import ast
import json
import re
import shlex
from itertools import chain, pairwise
from pathlib import Path

import click
import pytest
import yaml

import bdpo_plugin
from bdpo_plugin.cli import main
from bdpo_plugin.data.raw_rows import RowCheck
from bdpo_plugin.hosts.trl import side_effects
from bdpo_plugin.recipes.recipe_file import find_recipe
from bdpo_plugin.settings import PREFIX, RECIPE, BDPOSettings

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "bdpo_plugin").rglob("*.py"))
SWEEPS = ROOT / "example_configs" / "sweeps"
RECIPES = sorted(p for p in (ROOT / "example_configs").rglob("*.yml") if p.parent != SWEEPS)
README = ROOT / "README.md"
#: What a user reads: the README and the documents that it leads to.
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[str]:
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for text in TEXTS.values() for block in fenced.findall(text)]


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the rows, without the header, of the tables of a section."""
    text = TEXTS[ROOT / page]
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for i, row in enumerate(rows) if i > 0 and not set(row[0]) <= {"-"}]


def messages() -> str:
    """All string constants of the package; a placeholder of an f-string ends one."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


def test_keys_table_has_every_key_with_its_default() -> None:
    documented = {}
    for key, default, *_ in table("README.md", "Keys"):
        quoted = re.fullmatch("`(.+)`", default)  # in words where the code has None
        documented[key.strip("`")] = yaml.safe_load(quoted[1]) if quoted else None
    assert documented == BDPOSettings().to_keys()
    assert tuple(documented) == BDPOSettings.keys()


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda _: "block")
def test_yaml_blocks_are_valid(text) -> None:
    config = yaml.safe_load(text)
    assert "bdpo" in (config.get("rl"), config.get("pref_loss"))
    BDPOSettings.from_keys(config)


@pytest.mark.parametrize("text", blocks("python"), ids=lambda _: "block")
def test_python_blocks_use_public_names(text) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "bdpo_plugin":
            assert {name.name for name in node.names} <= set(bdpo_plugin.__all__)


@pytest.mark.parametrize("text", blocks("json"), ids=lambda _: "block")
def test_json_blocks_are_one_line_of_json(text) -> None:
    (line,) = text.splitlines()
    row = json.loads(line)
    if isinstance(row.get("prompt"), list):  # TRL's, whose rows need no host to be checked
        assert RowCheck()(row) == []


def commands_shown() -> list[str]:
    """The lines that begin with `bdpo`, `axolotl` or `python -m` in blocks without a language, and
    the commands of B-DPO in backticks."""
    texts = [re.sub(r"^```\w+\n.*?^```$", "", t, flags=re.M | re.S) for t in TEXTS.values()]
    shown = set()
    for text in texts:
        shown |= set(re.findall(r"^(?:bdpo|axolotl|python -m) .+$", text, re.MULTILINE))
        shown |= set(re.findall(r"`(bdpo (?:[a-z]+)(?: [^`\n]*)?)`", text))
    return sorted({part.strip() for line in shown for part in line.split("#")[0].split("&&")})


@pytest.mark.parametrize("line", commands_shown())
def test_commands_shown_exist(line) -> None:
    words = shlex.split(line.partition(" -- ")[0])
    named = dict(pairwise(words))
    if "--sweep" in words and named["--sweep"] != "FILE":
        assert (ROOT / named["--sweep"]).is_file()
    if words[:2] == ["python", "-m"]:
        module = ROOT.joinpath(*words[2].split("."))
        assert module.is_dir() or module.with_suffix(".py").is_file()
    if words[0] != "bdpo":
        return
    command: click.Command = main
    rest = words[1:]
    while rest and isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    if words[1] == "train":  # passes on what it does not know
        known = {f"--{key}" for key in (*side_effects.KEYS, *BDPOSettings.keys())}
    assert {word for word in rest if word.startswith("--")} - {"--help"} <= known
    if words[1] == "recipes" and rest and re.fullmatch(r"(axolotl|llamafactory|trl)/\S+", rest[0]):
        find_recipe(rest[0])


def test_the_table_of_weights_is_computed() -> None:
    """docs/alpha-and-beta.md: chosen / rejected / scale, by the difference and alpha."""
    import torch

    rows = [row for row in table("docs/alpha-and-beta.md", "What alpha does") if row[0] != "0"]
    assert len(rows) == 5
    for difference, *cells in rows:
        mi = torch.tensor([float(difference)])
        for alpha, cell in zip((0.5, 1, 1.5, 3), cells, strict=True):
            found = bdpo_plugin.balance_weights(mi, torch.zeros(1), alpha=alpha)
            assert cell == " / ".join(f"{value.item():.2f}" for value in found)


def test_argument_of_the_trainer_exists() -> None:
    shown = set(re.findall(r"DPOTrainer\(\.\.\., (\w+)=", "".join(blocks("python"))))
    assert shown == {"weigh"}
    trainer = ast.parse((ROOT / "bdpo_plugin" / "hosts" / "trl" / "trainer.py").read_text("utf-8"))
    made = next(n for n in ast.walk(trainer) if getattr(n, "name", None) == "__init__")
    assert shown == {argument.arg for argument in made.args.kwonlyargs}


def test_there_are_blocks_of_both_kinds() -> None:
    assert blocks("yaml")
    assert blocks("python")


def test_keys_named_anywhere_exist() -> None:
    known = set(BDPOSettings.keys())
    for page, text in TEXTS.items():
        named = set(re.findall(rf"`({PREFIX}\w+)[`:]", text)) - {"bdpo_plugin", "bdpo_loss", RECIPE}
        if name_of(page) == "docs/reliability.md":  # a column of the data in its cases
            named -= {"bdpo_weight_chosen"}
        if name_of(page) == "docs/troubleshooting.md":  # its table of mistakes
            named -= {"bdpo_alfa"}
        assert named <= known, page
        if page == README:
            assert named == known


def test_set_up_takes_two_commands() -> None:
    commands = re.findall(r"^make .*$", TEXTS[README], re.MULTILINE)
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    known = messages()
    quotes = [
        fragment.strip()
        for symptom, _ in table("docs/troubleshooting.md", "Messages")
        if not symptom.startswith("Axolotl: ")
        for quote in re.findall("`(.+?)`", symptom)
        for fragment in quote.split("...")
    ]
    assert len(quotes) > 10
    assert [quote for quote in quotes if quote not in known] == []


def test_method_sections_referred_to_exist() -> None:
    method = TEXTS[ROOT / "docs" / "method.md"]
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", method, re.MULTILINE)]
    assert numbers == list(range(1, 11))
    referred = set()
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    for text in [*texts, *TEXTS.values()]:
        for first, second in re.findall(r"\bsections?\s+(\d+)(?:\s+and\s+(\d+))?", text):
            referred |= {int(n) for n in (first, second) if n}
    assert referred
    assert referred <= set(numbers)


@pytest.mark.parametrize("path", ["objective/__init__.py", "settings.py"])
def test_docstrings_say_where_the_method_is(path) -> None:
    assert "docs/method.md" in (ROOT / "bdpo_plugin" / path).read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert 110 <= len(TEXTS[README].splitlines()) <= 140


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *sorted(p for p in ROOT.glob("*.md") if p != README),
        # not what a run of theirs has written
        *sorted(
            p
            for folder in ("benchmarks", "soak", "studies")
            for p in (ROOT / folder).rglob("*.md")
            if "work" not in p.relative_to(ROOT).parts
        ),
    ],
    ids=name_of,
)
def test_links_resolve(page) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


#: What a run, a checkpoint, a data set or another project has, and no file of this repository.
_ELSEWHERE = re.compile(
    r"(\./)?(\.packages|bdpo-demo|bdpo-mi|bdpo|OUTPUT_DIR|DIR|runs|checkpoint-\S+|examples)/|[/~$]|\w+\.(jsonl|png)$"
)


def files_named(text: str) -> set[str]:
    """What looks like the path of a file or folder among the words in backticks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = {word for words in re.findall(r"`([^`\n]+)`", text) for word in words.split()}
    path = re.compile(
        r"[\w.*{},/-]+(\.(py|md|yml|yaml|toml|cff|png)|/)|(tests|benchmarks|docs|soak|studies)/[\w./-]+"
    )
    return {word for word in quoted if path.fullmatch(word) and not _ELSEWHERE.match(word)}


def spelt_out(path: str) -> list[str]:
    """``a/{b,c}.py`` as ``a/b.py`` and ``a/c.py``."""
    before, brace, rest = path.partition("{")
    inner, _, after = rest.partition("}")
    return [before + word + after for word in inner.split(",")] if brace else [path]


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"],
    ids=name_of,
)
def test_files_named_exist(page) -> None:
    named = files_named(page.read_text(encoding="utf-8"))
    if page.name == "CONTRIBUTING.md":  # which speaks of a host that there is not
        named = {name for name in named if "newhost" not in name}
        assert len(named) > 40
    places = (ROOT, ROOT / "bdpo_plugin", page.parent)
    spelt = chain.from_iterable(map(spelt_out, named))
    missing = {n for n in spelt if not any(any(place.glob(n.rstrip("/"))) for place in places)}
    assert missing == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_where_a_host_the_loss_and_the_scores_are(page) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in (
        "bdpo_plugin/hosts/",
        "training/step.py",
        "objective/loss.py",
        "reference/store.py",
    ):
        assert path in text


def test_every_floor_is_in_the_picture() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("```\n  cli/")[1].split("```")[0]
    package = ROOT / "bdpo_plugin"
    floors = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    floors |= {path.name for path in package.glob("*.py")} - {"__init__.py", "autoload.py"}
    assert [floor for floor in floors - {"cli/"} if floor not in picture] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_recipe_is_valid(path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "trl":
        assert config["use_peft"]
    elif path.parent.name == "llamafactory":
        assert (config["stage"], config["pref_loss"]) == ("dpo", "bdpo")
    else:
        assert config["rl"] == "bdpo"
        assert config["plugins"] == ["bdpo_plugin.BDPOPlugin"]
    BDPOSettings.from_keys(config)


def test_changelog_and_citation_have_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{bdpo_plugin.__version__}]" in changelog
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bdpo_plugin.__version__


# Spelt so that this file does not name them itself.
_REGISTRIES = [".".join(n) for n in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"))]
_OF_ONE_MACHINE = re.compile(
    "|".join(map(re.escape, [*_REGISTRIES, "index" + "-url"]))
    + r"|(?<![\w.~}/])/(?:home|root|work|tmp|mnt|Users)/\w"
)


def test_nothing_is_of_one_machine() -> None:
    folders = ("bdpo_plugin", "tests", "benchmarks", "soak", "studies", "example_configs", "tools")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".yml")]
    files += [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*.cff")]
    files += [ROOT / n for n in ("Makefile", "pyproject.toml", ".ci/run")]
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if (match := _OF_ONE_MACHINE.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
