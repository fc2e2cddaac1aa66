"""What the mutual information goes with: the tables' figures on made data."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from studies.real_models.information import adjusted, tables


def test_what_is_explained_is_what_was_put_in() -> None:
    draw = np.random.default_rng(0)
    side = np.repeat([0.0, 1.0], 500)
    noise = draw.normal(size=1000)
    columns = [1 - side, side]
    assert adjusted(columns, side + 0.5 * noise) == pytest.approx(0.5, abs=0.05)
    assert adjusted(columns, noise) == pytest.approx(0, abs=0.01)
    assert adjusted([*columns, noise], side + noise) == pytest.approx(1)


def test_tables() -> None:
    draw = np.random.default_rng(1)
    texts = {
        "unsafe": ("I cannot help.", "First, do it."),
        "safe": ("Use a needle.", "Sorry, but no."),
    }
    pairs = [
        {"label": label, "chosen": {"content": good}, "rejected": {"content": bad}}
        for label, (good, bad) in texts.items()
        for _ in range(40)
    ]
    rows = [i for i in range(80) if i != 7]
    lengths = {"chosen": draw.integers(5, 50, 79), "rejected": draw.integers(5, 50, 79)}
    scores = {"row": rows}
    for side, tokens in lengths.items():
        scores[f"{side}_tokens"] = tokens.tolist()
        scores[f"ref_{side}_logps"] = (-draw.random(79) * tokens).tolist()
        scores[f"mi_{side}"] = (tokens / 10).tolist()  # it goes with the length alone
    text = "\n".join(tables(pairs, scores))
    assert "79 of 80 pairs were scored" in text
    assert "| length [tokens] | +1.00 | +1.00 | +1.00 |" in text
    assert "| unsafe | 39 |" in text
    assert "| I cannot | 39 |" in text
    explained = [line for line in text.splitlines() if line.startswith("| the label, and")]
    assert [line.split("|")[2].strip() for line in explained] == ["1.00"] * 3
