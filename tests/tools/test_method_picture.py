"""The README's picture is one that its script draws."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "method_picture.py"


def test_the_picture_is_drawn(tmp_path) -> None:
    script = runpy.run_path(str(SCRIPT))
    script["draw"](tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 10_000
    assert script["PICTURE"].is_file()
