"""`inspect`: exact quantiles, shares that follow from the counts, a picture that is drawn or refused with the remedy."""

from __future__ import annotations

import json
import sys

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds import preprocess
from bge_ds.data.preprocess import inspection
from bge_ds.data.shards import shard_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_path):
    """12 groups that name 36 passages, 12 of them different; one query is cut."""
    place = tmp_path_factory.mktemp("inspection")
    texts = [f"{text} {end}" for end in ("fox", "dog") for text in helpers.SENTENCES]
    rows = [{"query": "fox", "pos": [text], "neg": [texts[i - 1], texts[i - 2]]} for i, text in enumerate(texts)]
    rows[3]["query"] = "the lazy dog " * 10
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["finetune", "--input", str(place / "a.jsonl"), "--output", str(place / "s"), "--tokenizer"]
    assert preprocess.main([*argv, str(tiny_tokenizer_path), "--query_max_len", "16", "--passage_max_len", "500"]) == 0
    return place / "s"


@given(st.lists(st.integers(0, 40), min_size=1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_quantiles_are_exact(lengths, share):
    """The least length that so many rows do not exceed, from the counts alone: what sorting all rows would give."""
    wanted = np.quantile(lengths, share, method="inverted_cdf")
    assert inspection.quantile(np.bincount(lengths), share) == wanted


def test_what_is_shown(folder, capsys):
    """Counts, the share of texts that were cut, how often a passage is named, lengths of every column."""
    assert preprocess.main(["inspect", str(folder), "--sample", "1"]) == 0
    shown = capsys.readouterr().out
    assert "cut          1 of 24 texts (4.17%)" in shown
    assert "duplicates   36 passages named, 12 stored: 0.333 of them" in shown
    data = shard_reader.open_folder(folder)
    lengths = np.array([len(data.passage(row)) for row in range(12)])
    line = next(line for line in shown.splitlines() if line.startswith("tokens of a passage"))
    assert line.split()[4:] == [
        *(str(np.quantile(lengths, share, method="inverted_cdf")) for share in (0, *inspection.QUANTILES, 1)),
        f"{lengths.mean():.1f}",
    ]
    for name, value in (("positives", "1"), ("negatives", "2")):
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} of a group"))
        assert line.split()[4:-1] == [value] * 8


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(folder, tmp_path, ending):
    """A panel for every column, with its title and its median; drawing needs no display."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"lengths.{ending}"
    assert preprocess.main(["inspect", str(folder), "--histogram", str(picture)]) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(content) > 10_000
    if ending == "svg":
        assert all(f"<!-- {title} -->".encode() in content for title in ("tokens of a query", "negatives of a group"))


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(folder, tmp_path, monkeypatch, capsys):
    """An unknown ending, and a missing matplotlib with the command that installs it: one line, before anything is read."""
    assert preprocess.main(["inspect", "nowhere", "--histogram", "lengths.doc"]) == 2
    assert "--histogram lengths.doc: give a file that ends in .png or .svg" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert preprocess.main(["inspect", str(folder), "--histogram", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
