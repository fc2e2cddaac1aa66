"""Where a file of JSON is broken, in words."""

import pytest

from bdpo_plugin.data.files import json_problem

ROW = '{"chosen": "a"}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"{ROW}\n{ROW}\n", None),
        (f"\ufeff{ROW}\r\n\r\n{ROW}", None),
        (f"[{ROW},\n{ROW}]", None),
        ("", "it is empty"),
        (" \n\n", "it is empty"),
        ("[]", "it has no rows"),
        ('"text"', 'it is "text", not rows'),
        (f"{ROW}\n\n{{'chosen': 1}}\n", "line 3 is no JSON"),
        (f"{ROW}\n{ROW[:-1]}", "line 2 is no JSON"),
        (f"{ROW}\n3\n", "line 2 is 3, not an object"),
        (f"[{ROW},\n{ROW}\n{ROW}]", "line 3 is no JSON"),
        (f"[{ROW}, 3]", "row 1 is 3, not an object"),
        (f"{ROW}\n".encode() + b'{"chosen": "\xff"}', "line 2 is not text in UTF-8"),
        (None, "it cannot be read (No such file"),
    ],
)
def test_a_broken_file_is_told_by_its_line(tmp_path, content, words) -> None:
    file = tmp_path / "pairs.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    problem = json_problem(file)
    assert (problem or "None").startswith(str(words))
