"""Input files: finding them, and cutting each into segments by arithmetic on the input alone.

A segment is the unit of everything after: what is de-duplicated, written, found again after a kill, and shared out among
parts. Which line belongs to which segment must therefore depend on the input only, never on processes, parts or time:

    lines              a line belongs to segment (offset of its first byte) // cut. A segment of a plain file is found by
                       one seek and one search for a line's end; a compressed one counts decompressed bytes and is read
                       through from its beginning, as a stream has no other way.
    tables             rows [k * r, (k + 1) * r), r such that a segment has about `cut` bytes (`table_files.py`)

A part that takes only some segments asks for those; a stream's others are read over without being tokenised.
"""

import glob
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from bge_ds.data.preprocess import table_files

BLOCK_BYTES = 1 << 20
LINES = (".json", ".jsonl")
ENDINGS = tuple(f"{line}{packed}" for packed in ("", ".gz", ".zst") for line in LINES)
KNOWN = (*ENDINGS, *table_files.ENDINGS)
BOM = b"\xef\xbb\xbf"  # some editors put this mark before UTF-8


@dataclass(frozen=True)
class Source:
    """One input: a file, a folder written by `datasets.save_to_disk`, or one shard of a hub data set."""

    path: Path
    is_dataset: bool = False
    hub: table_files.HubShard | None = None

    @property
    def name(self) -> str:
        return str(self.hub) if self.hub else str(self.path)

    @property
    def is_table(self) -> bool:
        """Whether it is read by rows, which count from 0; lines count from 1."""
        return self.is_dataset or self.path.name.endswith(table_files.ENDINGS)

    @property
    def is_stream(self) -> bool:
        """Whether a segment can be reached only through those before it."""
        return self.hub is not None or self.path.suffix in (".gz", ".zst")

    @property
    def first_number(self) -> int:
        return 0 if self.is_table or self.hub else 1

    def files(self) -> list[Path]:
        if self.hub:
            return []
        return sorted(p for p in self.path.rglob("*") if p.is_file()) if self.is_dataset else [self.path]

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def identity(self) -> list[Any]:
        """What tells this input from an edited one at a glance: a name, then size and time of each file."""
        stats = [(path, path.stat()) for path in self.files()]
        parts = [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return [self.name, *parts, *([self.hub.revision] if self.hub else [])]


@dataclass(frozen=True)
class Block:
    """Some whole lines of one segment, undecoded, or its rows as an Arrow stream. Also tells where a segment ends."""

    source: int  # index of the source
    segment: int
    first: int = 0  # its first line's (row's) number in the segment
    data: bytes = field(default=b"", repr=False)
    advance: int = 0  # bytes of the file that reading this block took
    before: int | None = None  # lines of the source before the segment; None: not counted yet
    is_arrow: bool = False
    ends: str = ""  # "segment": that was all of it; "source": so was that, and `segment` is how many there are

    def lines(self) -> list[Any]:
        """Its lines as bytes, blank ones too, or its rows as objects: one ValueError where they cannot be decoded."""
        if self.is_arrow:
            return table_files.from_bytes(self.data)
        lines = self.data.split(b"\n")
        return lines if lines[-1] else lines[:-1]


# ---------------------------------------------------------------------------------------------------------- finding


def find_sources(inputs: list[str], skip_unknown: bool = False) -> list[Source]:
    """Files, folders, globs and hub names -> the sources, in the order given, a folder's or glob's sorted by name.

    Raises ValueError for a path that does not exist, an unknown kind of file (unless skipped), or nothing at all."""
    sources: list[Source] = []
    unknown: list[Path] = []
    for name in inputs:
        if name.startswith(table_files.HUB):
            sources += [Source(Path(str(shard)), hub=shard) for shard in table_files.hub_shards(name)]
            continue
        paths = [Path(name)] if Path(name).exists() else list(map(Path, sorted(glob.glob(name, recursive=True))))
        if not paths:
            raise ValueError(
                f"no file {name}: give a file ({', '.join(KNOWN)}), a folder, a quoted glob or {table_files.HUB_SYNTAX}"
            )
        for path in paths:
            _sort_in(path, sources, unknown, is_folder_given=True)
    if unknown and not skip_unknown:
        shown = ", ".join(map(str, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"unknown kind of file: {shown}. Read are {', '.join(KNOWN)} and folders written by"
            " datasets.save_to_disk; `python -m bge_ds.preprocess ... --skip_unknown` passes over all others"
        )
    if not sources:
        raise ValueError(f"no file of a known kind ({', '.join(KNOWN)}) in {', '.join(inputs)}")
    return sources


def _sort_in(path: Path, sources: list[Source], unknown: list[Path], is_folder_given: bool) -> None:
    if path.is_file():
        if path.name.endswith(KNOWN):
            sources.append(Source(path))
        else:
            unknown.append(path)
    elif (path / "dataset_dict.json").exists():
        raise ValueError(f"{path} is a DatasetDict of several splits: name the folder of one, e.g. {path / 'train'}")
    elif (path / "state.json").exists() and (path / "dataset_info.json").exists():
        sources.append(Source(path, is_dataset=True))
    elif (path / "manifest.json").exists():
        raise ValueError(f"{path} is a folder of shards already: give it to the trainer as --train_data, or as an entry of it")
    elif is_folder_given:
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                _sort_in(inner, sources, unknown, is_folder_given=False)
    else:
        unknown.append(path)


# ---------------------------------------------------------------------------------------------------------- reading


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, line) of all lines of a file, compressed or not, that are not blank. Raises ValueError for a broken one."""
    for block in read_segments(Source(path), 0, sys.maxsize):
        for number, line in enumerate(block.lines(), block.first + 1):
            if line.strip():
                yield f"{path}:{number}", line


def read_segments(
    source: Source,
    index: int,
    cut: int,
    wanted: Callable[[int], bool] = lambda segment: True,
    *,
    columns: tuple[str, ...] = (),
    sample: int = 0,
    block_bytes: int = 0,
) -> Iterator[Block]:
    """The blocks of the wanted segments in order; after each segment, and at the end, a block that says so.

    `cut` is a segment's bytes, `columns` those that a table is read for. sample: the source ends after so many lines that
    are not blank. Raises ValueError for a broken input."""
    block_bytes = block_bytes or BLOCK_BYTES
    if source.is_table:
        table = table_files.InputTable(source.path, source.is_dataset, columns)
        blocks = _read_rows(table, index, cut, wanted, block_bytes)
    elif source.is_stream:
        blocks = _read_stream(source, index, cut, wanted, block_bytes, columns)
    else:
        blocks = _read_file(source.path, index, cut, wanted, block_bytes)
    segment = 0
    for block in _first_lines(blocks, sample) if sample else blocks:
        yield from (Block(index, k, ends="segment") for k in filter(wanted, range(segment, block.segment)))
        segment = block.segment
        yield block


class LineReader:
    """The lines of a file, compressed or not, or of a hub data set, from the offset of any line on.

    Offsets are of unpacked bytes. A compressed file is read through from its beginning, once where the offsets rise."""

    def __init__(self, source: Source, columns: tuple[str, ...] = ()) -> None:
        self.source, self.columns = source, columns
        self._at, self._data = sys.maxsize, b""  # the piece of whole lines that was read last, and its offset
        self._pieces: Iterator[bytes] = iter(())

    def read(self, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, line without its end) of all lines from `offset` on, blank ones too. Raises ValueError for a broken file."""
        if offset < self._at or not self.source.is_stream:
            self._at = 0 if self.source.is_stream else offset
            self._data, self._pieces = b"", self._open(self._at)
        while True:
            if offset < self._at + len(self._data):
                lines = self._data[offset - self._at :].split(b"\n")
                for line in lines if lines[-1] else lines[:-1]:
                    yield offset, line if offset else line.removeprefix(BOM)
                    offset += len(line) + 1
            if (data := next(self._pieces, None)) is None:
                return
            self._at, self._data = self._at + len(self._data), data

    def _open(self, offset: int) -> Iterator[bytes]:
        if self.source.hub:
            yield from table_files.hub_lines(self.source.hub, self.columns, BLOCK_BYTES)
        elif self.source.is_stream:
            yield from (data for data, _ in _unpacked(self.source.path, BLOCK_BYTES))
        else:
            with open(self.source.path, "rb") as file:
                file.seek(offset)
                yield from _whole_lines(file, BLOCK_BYTES)


def lines_before(source: Source, segment: int, cut: int, columns: tuple[str, ...] = ()) -> int:
    """How many lines (rows) of a source stand before a segment. Reads what precedes: for an error's line number only."""
    if source.is_table:
        return segment * table_files.InputTable(source.path, source.is_dataset, columns).segment_rows(cut)
    assert not source.is_stream, "a stream's blocks carry the count"
    with open(source.path, "rb") as file:
        end = _line_start(file, segment * cut)
        file.seek(0)
        return sum(data.count(b"\n") for data in _whole_lines(file, BLOCK_BYTES, end))


def place_of(source: Source, block: Block, number: int, cut: int, columns: tuple[str, ...] = ()) -> str:
    """`file:line` of a line (row) of a block's segment, where it has that number."""
    before = lines_before(source, block.segment, cut, columns) if block.before is None else block.before
    return f"{source.name}:{before + number + source.first_number}"


def _first_lines(blocks: Iterator[Block], left: int) -> Iterator[Block]:
    """The blocks up to the first `left` lines that are not blank (rows); the source then ends there."""
    for block in blocks:
        data, at = block.data, 0
        if block.is_arrow:
            data, rows = table_files.head(data, left)
            left -= rows
        else:
            while left and at < len(data):
                begin, at = at, data.find(b"\n", at) + 1 or len(data)
                left -= bool(data[begin:at].strip())
            data = data[:at]
        yield replace(block, data=data)
        if not left and not block.ends:
            yield Block(block.source, block.segment + 1, ends="source")
            return


# The readers below give the blocks of the wanted segments, and a last one that tells how many segments there are.


def _read_rows(
    table: table_files.InputTable, index: int, cut: int, wanted: Callable[[int], bool], block_bytes: int
) -> Iterator[Block]:
    rows = table.segment_rows(cut)
    segments = max(1, -(-table.rows // rows))
    for k in filter(wanted, range(segments)):
        first, last = k * rows, min((k + 1) * rows, table.rows)
        at = first
        for count, data in table.read(first, last, block_bytes):
            advance = table.num_bytes * (at + count) // table.rows - table.num_bytes * at // table.rows
            yield Block(index, k, at - first, data, advance, first, is_arrow=True)
            at += count
    yield Block(index, segments, ends="source")


def _read_file(path: Path, index: int, cut: int, wanted: Callable[[int], bool], block_bytes: int) -> Iterator[Block]:
    with open(path, "rb") as file:
        segments = max(1, -(-(size := file.seek(0, 2)) // cut))
        for k in filter(wanted, range(segments)):
            end = _line_start(file, min((k + 1) * cut, size))
            start = _line_start(file, k * cut)
            line = 0
            for data in _whole_lines(file, block_bytes, end - start):
                text = data.removeprefix(BOM) if start == 0 and line == 0 else data
                yield Block(index, k, line, text, len(data))
                line += data.count(b"\n")
    yield Block(index, segments, ends="source")


def _line_start(file: BinaryIO, offset: int) -> int:
    """Goes to the first line that begins at `offset` or after, or to the end; returns where that is."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline()
    return file.tell()


def _whole_lines(file: Any, block_bytes: int, left: int = sys.maxsize) -> Iterator[bytes]:
    """The next `left` bytes of a file, in pieces of about `block_bytes` that end where lines do."""
    rest: list[bytes] = []
    while True:
        chunk = file.read(min(block_bytes, left))
        left -= len(chunk)
        cut = chunk.rfind(b"\n") + 1
        if chunk and not cut:
            rest.append(chunk)
            continue
        data = b"".join([*rest, chunk[:cut]])
        rest = [chunk[cut:]]
        if data:
            yield data
        if not chunk:
            return


def _read_stream(
    source: Source, index: int, cut: int, wanted: Callable[[int], bool], block_bytes: int, columns: tuple[str, ...]
) -> Iterator[Block]:
    """A line goes to the segment that its first byte's offset says; segments that no line begins in are empty."""
    segment, line, before, offset = 0, 0, 0, 0
    if source.hub:
        chunks = ((data, 0) for data in table_files.hub_lines(source.hub, columns, block_bytes))
    else:
        chunks = _unpacked(source.path, block_bytes)
    for data, advance in chunks:
        at = 0
        while at < len(data):
            if (here := (offset + at) // cut) > segment:
                segment, line, before = here, 0, before + line
            border = (segment + 1) * cut - offset
            # The first line that begins at the border or after: its predecessor ends at border - 1 or after.
            end = len(data) if border >= len(data) else data.find(b"\n", border - 1) + 1 or len(data)
            if wanted(segment):
                text = data[at:end]
                yield Block(index, segment, line, text if offset + at else text.removeprefix(BOM), advance, before)
                advance = 0
            line, at = line + data.count(b"\n", at, end), end
        offset += len(data)
    yield Block(index, segment + 1, ends="source")


def _unpacked(path: Path, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(whole lines, bytes of the file that they took) of a compressed file."""
    line, at, kind = 1, 0, "gzip" if path.suffix == ".gz" else "zstd"
    with open(path, "rb") as raw:
        # pyarrow refuses a gzip file that is padded with zeros, Python's reader does not.
        lines = _whole_lines(gzip.open(raw) if kind == "gzip" else pa.CompressedInputStream(raw, kind), block_bytes)  # noqa: SIM115
        while True:
            try:
                data = next(lines, b"")
            except gzip.BadGzipFile as error:
                raise ValueError(f"{path}:{line}: not gzip, though its name ends in .gz: {error}") from error
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path}:{line}: the {kind} stream breaks off near this line: {error}") from error
            if not data:
                return
            here = raw.tell()
            yield data, here - at
            line, at = line + data.count(b"\n"), here
