"""Inputs are cut into segments by arithmetic on the input alone: no line lost, doubled or misnumbered, for every form."""

from __future__ import annotations

import gzip
import json

import pytest

from bge_ds.data import records, sources, tables

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def lines_of(path, block_bytes: int) -> list[tuple[int, bytes]]:
    """(number, line) of all lines, as preprocessing counts them."""
    found = []
    for block in sources.read_blocks(sources.Source(path), 0, block_bytes):
        assert block.data
        rows = block.data.split(b"\n")
        found += [(number, row) for number, row in enumerate(rows, block.first) if row]
    return found


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_hold_whole_lines_with_their_numbers(tmp_path, ending, block_bytes):
    """Whatever the block size, no line is cut, lost or misnumbered: long, blank and unended ones included."""
    lines = [json.dumps({"text": "x" * n}) for n in (1, 300, 5, 0, 40)]
    text = "\n".join([lines[0], lines[1], "", *lines[2:]]).encode()
    path = tmp_path / f"a{ending}"
    text = b"\xef\xbb\xbf" + text  # some editors put this mark before UTF-8
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    wanted = [(n, line.encode()) for n, line in zip((1, 2, 4, 5, 6), lines, strict=True)]
    assert lines_of(path, block_bytes) == wanted


def test_progress_adds_up_to_the_file(tmp_path):
    """The progress bar counts bytes of the file itself, compressed or not, and ends at its size."""
    for name, data in (("a.jsonl", b'{"text": "x"}\n' * 500), ("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500))):
        (tmp_path / name).write_bytes(data)
        blocks = list(sources.read_blocks(sources.Source(tmp_path / name), 0, 512))
        assert sum(block.advance for block in blocks) == len(data) and len(blocks) > 1


def test_broken_gzip_is_named(tmp_path):
    """A download cut short must not be read as a shorter data set."""
    data = gzip.compress(b'{"text": "x"}\n' * 5000)
    for name, content, message in (
        ("cut.jsonl.gz", data[:-9], r"cut\.jsonl\.gz:\d+: the gzip stream breaks off"),
        ("not.jsonl.gz", b'{"text": "x"}\n', r"not\.jsonl\.gz:1: not gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(sources.read_blocks(sources.Source(tmp_path / name), 0))


def test_sources_of_folders_and_globs(tmp_path):
    """A folder gives its files sorted by name, no hidden ones; unknown ones are refused by name, or skipped."""
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".git"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda found: [source.path.name for source in found]  # noqa: E731
    assert names(sources.find_sources([str(tmp_path)])) == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert names(sources.find_sources([str(tmp_path / "*.jsonl*")])) == ["b.jsonl", "c.jsonl.gz"]
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown kind of file: .*notes\.txt\. Read are \.json, .* --skip_unknown"):
        sources.find_sources([str(tmp_path)])
    assert len(sources.find_sources([str(tmp_path)], skip_unknown=True)) == 3
    for absent in ("none.jsonl", "*.none"):
        with pytest.raises(ValueError, match=r"no file .*none"):
            sources.find_sources([str(tmp_path / absent)])


def test_datasets_folders_are_read_by_row(tmp_path):
    """A folder of datasets.save_to_disk gives the same lines as JSON; its rows count from 0, as in datasets."""
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, GOOD | {"query": "另一个", "neg": []}]
    made = datasets.Dataset.from_list(rows).add_column("extra", [b"\xff", b"\xfe"])
    made.save_to_disk(tmp_path / "all" / "d")
    (source,) = sources.find_sources([str(tmp_path / "all")])
    assert source.is_dataset and source.path.name == "d"
    block, *ends = sources.read_segments(source, 0, 1 << 20, columns=records.KEYS["finetune"])
    assert block.first == 0 and block.advance == source.num_bytes()
    assert [(end.ends, end.segment) for end in ends] == [("segment", 0), ("source", 1)]
    parsed = [records.check(row, "finetune") for row in tables.unpack(block.data)]
    assert parsed == rows
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="is a DatasetDict of several splits: name the folder of one"):
        sources.find_sources([str(tmp_path / "splits")])
