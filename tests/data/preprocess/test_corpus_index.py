"""Ids of a corpus: each finds its row, whatever the size, and a doubled or missing one is named with file and line."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from bge_ds.data.preprocess import corpus_index, input_files


def write(path, rows) -> input_files.Source:
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return input_files.Source(path)


@pytest.mark.parametrize("held", [1, 7, 1 << 20])
def test_each_id_finds_its_row(tmp_path, monkeypatch, held):
    """Buckets are sorted one by one: their order end to end must be that of the whole, and rows those of the lines."""
    monkeypatch.setattr(corpus_index, "HELD", held)
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 300)
    rows = [{"_id": f"doc {i}", "title": "t" * (i % 3), "text": f"text {i}"} for i in range(300)]
    given = [write(tmp_path / "a.jsonl", [*rows[:100], b"\n", *rows[100:170]]), write(tmp_path / "b.jsonl.gz", rows[170:])]
    counts = corpus_index.build_index(tmp_path / "index", given, 2000, ())
    assert [sum(segment) for segment in counts] == [170, 130] and len(counts[0]) > 3
    index = corpus_index.IdIndex(tmp_path / "index")
    asked = np.random.default_rng(0).permutation(300).tolist()
    assert index.rows([f"doc {i}" for i in asked]).tolist() == asked
    assert index.rows(["doc 5", "doc 300", ""]).tolist() == [5, -1, -1]
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [corpus_index.ENTRIES, corpus_index.KEYS]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_an_id_given_twice_is_named_with_both_places(tmp_path, ending):
    """Two texts under one id: whichever were taken, half of the groups that name it would train on the wrong one."""
    rows = [{"_id": str(i), "text": f"text {i}"} for i in range(100)]
    given = [write(tmp_path / f"a{ending}", rows), write(tmp_path / "b.jsonl", [{"_id": 37, "text": "other"}])]
    with pytest.raises(ValueError, match=rf"b\.jsonl:1: its _id is that of .*a{ending}:38 already"):
        corpus_index.build_index(tmp_path / "index", given, 500, ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{oops\n", "not JSON"),
        ({"text": "t"}, '"_id" must be a string or a whole number|"_id" is missing'),
        ({"_id": "", "text": "t"}, '"_id" is an empty id'),
        ({"_id": "x", "text": " "}, '"text" is an empty text'),
        ({"_id": "x", "title": 3, "text": "t"}, '"title" must be a string'),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path, row, message):
    """Groups refer to a corpus by rows, so no line of it can be passed over."""
    rows = [{"_id": str(i), "text": f"text {i}"} for i in range(30)]
    with pytest.raises(ValueError, match=rf"a\.jsonl:31: ({message})"):
        corpus_index.build_index(tmp_path / "index", [write(tmp_path / "a.jsonl", [*rows, row])], 200, ())
