"""What `make demo` shows of a host's output, on output as Axolotl writes it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "demo_screen.py"
HOST = (
    "[2026-11-24 10:00:00,000] [INFO] [axolotl.bdpo] B-DPO: `rl: bdpo` resolved to `rl: dpo`\n"
    "\rTokenizing train dataset:   0%|          | 0/256 [00:00<?, ? examples/s]"
    "\rTokenizing train dataset: 100%|██████████| 256/256 [00:00<00:00, 816.39 examples/s]\n"
    "B-DPO                    \n"
    "┌────────┬─────────┐\n"
    "│ scored │ per 'ö' │\n"
    "└────────┴─────────┘\n"
    "\rScoring the train data:  11%|█  | 3.11k/28.5k [00:00<00:01, 2tok/s]"
    "\rScoring the train data: 100%|███| 28.5k/28.5k [00:00<00:00, 3tok/s]"
    "\rScoring the train data: 100%|███| 28.5k/28.5k [00:01<00:00, 3tok/s]\n"
    "\r  0%|          | 0/64 [00:00<?, ?it/s]UserWarning: 50%| of a warning\n"
    "\r  2%|▏         | 1/64 [00:00<01:00,  1.04it/s]"
    "\r                                             \r{'loss': '0.6931', 'bdpo/scale': '0.97'}\n"
    "\r  0%|          | 0/4 [00:00<?, ?it/s]\x1b[A\n"
    "\r100%|██████████| 4/4 [00:00<00:00, 16.93it/s]\n"
    "\r100%|██████████| 64/64 [00:14<00:00,  4.70it/s]\r\n"
    "\r100%|██████████| 64/64 [00:15<00:00,  4.11it/s]\n"
)
TABLE = "B-DPO\n┌────────┬─────────┐\n│ scored │ per 'ö' │\n└────────┴─────────┘\n"
SCORED = "Scoring the train data: 100%|███| 28.5k/28.5k [00:00<00:00, 3tok/s]\n"
TRAINED = "Training: 100%|██████████| 64/64 [00:14<00:00,  4.70it/s]\n"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("demo_screen", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_a_pipe_gets_tables_and_full_bars() -> None:
    done = subprocess.run([sys.executable, SCRIPT], input=HOST.encode(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == TABLE + SCORED + TRAINED


def test_a_terminal_gets_bars_that_move(module) -> None:
    written = list(module.screen(module.pieces(HOST), terminal=True))
    clear = "\r\x1b[K"
    assert "".join(written[:4]) == TABLE
    assert [text.removeprefix(clear)[:20] for text in written[4:]] == [
        "Scoring the train da",
        "Scoring the train da",
        "Training:   0%|     ",
        "Training:   2%|▏    ",
        "Training: 100%|█████",
    ]
    assert all(text.startswith(clear) for text in written[4:])
    assert [text.endswith("\n") for text in written[4:]] == [False, True, False, False, True]
    assert "warning" not in "".join(written)


def test_a_run_that_ends_early_leaves_the_cursor_on_a_line_of_its_own(module) -> None:
    shown = "\r 50%|█████     | 32/64 [00:14<00:00,  4.70it/s]\nKilled\n"
    assert list(module.screen(module.pieces(shown), terminal=True))[-1] == "\n"


def test_the_bars_are_those_of_the_package(module) -> None:
    package = (SCRIPT.parents[1] / "bdpo_plugin").rglob("*.py")
    code = "".join(path.read_text(encoding="utf-8") for path in package)
    for beginning in module._OURS:
        assert f'desc=f"{beginning}' in code


def test_bytes_that_are_no_text_end_nothing() -> None:
    given = b"\xff\xfe\n" + TABLE.encode()
    done = subprocess.run([sys.executable, SCRIPT], input=given, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, TABLE)
