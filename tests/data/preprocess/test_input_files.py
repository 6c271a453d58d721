"""Inputs are cut into segments by arithmetic on the input alone: no line lost, doubled or misnumbered, for every form."""

from __future__ import annotations

import gzip
import json
import string

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data.preprocess import input_files, table_files, validate

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def pack(ending: str, data: bytes) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if ending.endswith(".zst") else data


def lines_of(path, block_bytes: int) -> list[tuple[int, bytes]]:
    """(number, line) of all lines, as preprocessing counts them."""
    found = []
    for block in input_files.read_segments(input_files.Source(path), 0, 1 << 62, block_bytes=block_bytes):
        assert bool(block.data) != bool(block.ends)
        found += [(number, row) for number, row in enumerate(block.data.split(b"\n"), block.first + 1) if row]
    assert found == [(int(place.rpartition(":")[2]), row) for place, row in input_files.read_lines(path)]
    return found


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_hold_whole_lines_with_their_numbers(tmp_path, ending, block_bytes):
    """Whatever the block size, no line is cut, lost or misnumbered: long, blank and unended ones included."""
    lines = [json.dumps({"text": "x" * n}) for n in (1, 300, 5, 0, 40)]
    text = "\n".join([lines[0], lines[1], "", *lines[2:]]).encode()
    path = tmp_path / f"a{ending}"
    text = b"\xef\xbb\xbf" + text  # some editors put this mark before UTF-8
    path.write_bytes(pack(ending, text))
    wanted = [(n, line.encode()) for n, line in zip((1, 2, 4, 5, 6), lines, strict=True)]
    assert lines_of(path, block_bytes) == wanted


def test_progress_adds_up_to_the_file(tmp_path):
    """The progress bar counts bytes of the file itself, compressed or not, and ends at its size."""
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        data = pack(name, b'{"text": "x"}\n' * 500)
        (tmp_path / name).write_bytes(data)
        blocks = list(input_files.read_segments(input_files.Source(tmp_path / name), 0, 1 << 62, block_bytes=512))
        assert sum(block.advance for block in blocks) == len(data) and len(blocks) > 3


def test_broken_streams_are_named(tmp_path):
    """A download cut short must not be read as a shorter data set."""
    data = gzip.compress(b'{"text": "x"}\n' * 5000)
    frame = zstandard.compress(b'{"text": "x"}\n' * 5000)
    for name, content, message in (
        ("cut.jsonl.zst", frame[:-9], r"cut\.jsonl\.zst:\d+: the zstd stream breaks off"),
        ("second.jsonl.zst", frame + frame[:20], r"second\.jsonl\.zst:\d+: the zstd stream breaks off"),
        ("not.jsonl.zst", b'{"text": "x"}\n', r"not\.jsonl\.zst:1: the zstd stream breaks off"),
        ("cut.jsonl.gz", data[:-9], r"cut\.jsonl\.gz:\d+: the gzip stream breaks off"),
        ("not.jsonl.gz", b'{"text": "x"}\n', r"not\.jsonl\.gz:1: not gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(input_files.read_lines(tmp_path / name))


def test_sources_of_folders_and_globs(tmp_path):
    """A folder gives its files sorted by name, no hidden ones; unknown ones are refused by name, or skipped."""
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".git"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda found: [source.path.name for source in found]  # noqa: E731
    assert names(input_files.find_sources([str(tmp_path)])) == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert names(input_files.find_sources([str(tmp_path / "*.jsonl*")])) == ["b.jsonl", "c.jsonl.gz"]
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown kind of file: .*notes\.txt\. Read are \.json, .* --skip_unknown"):
        input_files.find_sources([str(tmp_path)])
    assert len(input_files.find_sources([str(tmp_path)], skip_unknown=True)) == 3
    for absent in ("none.jsonl", "*.none"):
        with pytest.raises(ValueError, match=r"no file .*none"):
            input_files.find_sources([str(tmp_path / absent)])


def test_datasets_folders_are_read_by_row(tmp_path):
    """A folder of datasets.save_to_disk gives the same lines as JSON; its rows count from 0, as in datasets."""
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, GOOD | {"query": "另一个", "neg": []}]
    made = datasets.Dataset.from_list(rows).add_column("extra", [b"\xff", b"\xfe"])
    made.save_to_disk(tmp_path / "all" / "d")
    (source,) = input_files.find_sources([str(tmp_path / "all")])
    assert source.is_dataset and source.path.name == "d"
    block, *ends = input_files.read_segments(source, 0, 1 << 20, columns=validate.KEYS["finetune"])
    assert block.first == 0 and block.advance == source.num_bytes()
    assert [(end.ends, end.segment) for end in ends] == [("segment", 0), ("source", 1)]
    parsed = [validate.check(row, "finetune") for row in table_files.from_bytes(block.data)]
    assert parsed == rows
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="is a DatasetDict of several splits: name the folder of one"):
        input_files.find_sources([str(tmp_path / "splits")])


# --------------------------------------------------------------------------------------------------------- segments


def by_segment(source, cut, wanted=lambda k: True, block_bytes=0, columns=("text",)) -> tuple[dict[int, list], int]:
    """(segment -> its blank-free lines with their numbers in the source, number of segments)."""
    found: dict[int, list] = {}
    segments, open_segment = None, None
    for block in input_files.read_segments(source, 0, cut, wanted, columns=columns, block_bytes=block_bytes):
        assert segments is None, "a block after the end of the source"
        if block.ends == "source":
            segments = block.segment
        elif block.ends:
            assert open_segment in (None, block.segment)
            found.setdefault(block.segment, [])
            open_segment = None
        else:
            open_segment = block.segment
            before = block.before
            if before is None:
                before = input_files.lines_before(source, block.segment, cut, columns)
            lines = table_files.from_bytes(block.data) if block.is_arrow else block.data.split(b"\n")
            kept = [(before + number + source.first_number, line) for number, line in enumerate(lines, block.first) if line]
            found.setdefault(block.segment, []).extend(kept)
    assert open_segment is None and list(found) == sorted(found)
    return found, segments


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.text(string.ascii_letters, max_size=30), max_size=30),
    ended=st.booleans(),
    cut=st.integers(1, 200),
    block_bytes=st.integers(1, 60),
    parts=st.integers(1, 4),
    ending=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]),
)
def test_every_line_is_in_one_segment(tmp_path_factory, lines, ended, cut, block_bytes, parts, ending):
    """For any lengths of lines, blank ones and lines longer than a segment: each once, with its number, for any parts."""
    text = "\n".join(lines).encode() + (b"\n" if ended else b"")
    path = tmp_path_factory.mktemp("s") / f"a{ending}"
    path.write_bytes(pack(ending, text))
    source = input_files.Source(path)
    whole, count = by_segment(source, cut, block_bytes=block_bytes)
    assert sorted(whole) == list(range(count))
    wanted = [(number, line.encode()) for number, line in enumerate(lines, 1) if line]
    assert [pair for segment in whole.values() for pair in segment] == wanted
    start, place = 0, {}
    for number, line in enumerate(lines, 1):
        place[number] = start // cut
        start += len(line) + 1
    assert all(place[number] == k for k, segment in whole.items() for number, _ in segment), "not the first byte's segment"
    for part in range(parts):
        mine, found = by_segment(source, cut, lambda k, part=part: k % parts == part, block_bytes)
        assert found == count and mine == {k: whole[k] for k in whole if k % parts == part}


def write_tables(folder, rows) -> list:
    """The same rows as Parquet with row groups of 7, an Arrow file, an Arrow stream and a datasets folder."""
    datasets = pytest.importorskip("datasets")
    table = pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(str(folder / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    with pa.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    datasets.Dataset.from_list(rows).save_to_disk(folder / "d", num_shards=2)
    return [input_files.Source(folder / name) for name in ("a.parquet", "file.arrow", "stream.arrow")] + [
        input_files.Source(folder / "d", is_dataset=True)
    ]


def test_tables_are_cut_by_rows(tmp_path):
    """A table's segments are ranges of rows, found without reading what precedes: each row once, whatever its form."""
    rows = [{"text": f"text {i}" * (i % 5 + 1), "other": i} for i in range(50)]
    for source in write_tables(tmp_path, rows):
        for cut in (1, source.num_bytes() // 4, 1 << 40):
            whole, count = by_segment(source, cut)
            assert sorted(whole) == list(range(count)) and (count == 1) == (cut == 1 << 40)
            assert [pair for segment in whole.values() for pair in segment] == [
                (i, {"text": row["text"]}) for i, row in enumerate(rows)
            ], source
            some, found = by_segment(source, cut, lambda k: k % 3 == 1, block_bytes=30)
            assert found == count and some == {k: whole[k] for k in whole if k % 3 == 1}


def test_broken_and_foreign_tables_are_named(tmp_path):
    """A table cut short, or without a column that is asked for, must not be read as an empty one."""
    for source in write_tables(tmp_path, [{"text": "x"}] * 20)[:3]:
        with pytest.raises(ValueError, match=r"none of the columns query, pos; it has text: name them by --columns"):
            by_segment(source, 100, columns=("query", "pos"))
        source.path.write_bytes(source.path.read_bytes()[: 60 if source.path.name == "stream.arrow" else -5])
        with pytest.raises(ValueError, match=rf"{source.path.name}: cannot be read as a table"):
            by_segment(source, 100)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of two files, addressed like one of the hub, without the network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for name, numbers in (("train-0", range(30)), ("train-1", range(30, 50)), ("test-0", range(3))):
        rows = [json.dumps({"content": f"text {i}", "n": i}) for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return f"hf://{folder}"


def test_hub_sets_are_streamed_shard_by_shard(hub):
    """Each of the hub's files is a source of its own, so that parts and kills work for it too; `train` is the default."""
    found = input_files.find_sources([hub, f"{hub}@test"])
    assert [source.name for source in found] == [f"{hub}@train#0", f"{hub}@train#1", f"{hub}@test#0"]
    rows = [by_segment(source, 200, columns=("content",)) for source in found]
    texts = [json.loads(line)["content"] for whole, _ in rows for segment in whole.values() for _, line in segment]
    assert texts == [f"text {i}" for i in (*range(50), *range(3))] and rows[0][1] > 2
    assert rows[0][0][0][0] == (0, b'{"content":"text 0"}')
    with pytest.raises(ValueError, match=r"no split 'dev': it has (train, test|test, train); the form is hf://NAME"):
        input_files.find_sources([f"{hub}@dev"])
    with pytest.raises(ValueError, match=r"hf://.*nowhere: datasets cannot load it: .* the form is"):
        input_files.find_sources([f"{hub}/nowhere"])


@given(st.lists(st.text(alphabet=string.ascii_letters, max_size=30), min_size=1, max_size=30), st.randoms(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_lines_from_any_offset(tmp_path_factory, lines, random, mark):
    """From the offset of any line on, in any order, plain and compressed files give the same lines: none lost or doubled."""
    text = (b"\xef\xbb\xbf" if mark else b"") + "\n".join(lines).encode()
    folder, at, wanted = tmp_path_factory.mktemp("lines"), 0, []
    for line in text.split(b"\n"):
        wanted.append((at, line.removeprefix(b"\xef\xbb\xbf")))
        at += len(line) + 1
    if not text.split(b"\n")[-1]:
        wanted.pop()  # what follows the last end of a line
    for ending in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        (folder / f"a{ending}").write_bytes(pack(ending, text))
        reader = input_files.LineReader(input_files.Source(folder / f"a{ending}"))
        assert list(reader.read()) == wanted
        for _ in range(4):
            if wanted:
                first, count = random.randrange(len(wanted)), random.randrange(1, 5)
                found = [line for line, _ in zip(reader.read(wanted[first][0]), range(count), strict=False)]
                assert found == wanted[first : first + count]


def test_lines_from_offsets_in_a_large_stream(tmp_path, monkeypatch):
    """A stream of many pieces is read once where offsets rise, and again from its beginning where one falls."""
    monkeypatch.setattr(input_files, "BLOCK_BYTES", 64)
    lines = [json.dumps({"text": "x" * (n % 90)}).encode() for n in range(200)]
    offsets = [sum(len(line) + 1 for line in lines[:n]) for n in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    opened = []
    unpacked = input_files._unpacked
    monkeypatch.setattr(input_files, "_unpacked", lambda *args: opened.append(args) or unpacked(*args))
    reader = input_files.LineReader(input_files.Source(tmp_path / "a.jsonl.gz"))
    for first, times in ((0, 1), (20, 1), (40, 1), (120, 1), (199, 1), (7, 2)):
        found = [line for (_, line), _ in zip(reader.read(offsets[first]), range(20), strict=False)]
        assert found == lines[first : first + 20] and len(opened) == times
