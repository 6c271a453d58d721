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
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    first: int  # its first line's (row's) number in the segment, from 0
    data: bytes = field(repr=False)
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


def read_segments(
    source: Source,
    index: int,
    cut: int,
    wanted: Callable[[int], bool] = lambda segment: True,
    *,
    columns: tuple[str, ...] = (),
    block_bytes: int = 0,
) -> Iterator[Block]:
    """The blocks of the wanted segments in order; after each segment, and at the end, a block that says so.

    `cut` is a segment's bytes, `columns` those that a table is read for. Raises ValueError for a broken input."""
    block_bytes = block_bytes or BLOCK_BYTES
    if source.is_table:
        yield from _read_rows(table_files.InputTable(source.path, source.is_dataset, columns), index, cut, wanted, block_bytes)
    elif source.is_stream:
        yield from _read_stream(source, index, cut, wanted, block_bytes, columns)
    else:
        yield from _read_file(source.path, index, cut, wanted, block_bytes)


def read_blocks(source: Source, index: int, block_bytes: int = 0) -> Iterator[Block]:
    """A file of lines from beginning to end, in blocks of about `block_bytes`; `first` is then the line, from 1."""
    for block in read_segments(source, index, 1 << 62, block_bytes=block_bytes):
        if not block.ends:
            yield Block(index, 0, block.first + 1, block.data, block.advance)


def lines_before(source: Source, segment: int, cut: int, columns: tuple[str, ...] = ()) -> int:
    """How many lines (rows) of a source stand before a segment. Reads what precedes: for an error's line number only."""
    if source.is_table:
        return segment * table_files.InputTable(source.path, source.is_dataset, columns).segment_rows(cut)
    assert not source.is_stream, "a stream's blocks carry the count"
    with open(source.path, "rb") as file:
        left, count = _line_start(file, segment * cut), 0
        file.seek(0)
        while left and (chunk := file.read(min(left, BLOCK_BYTES))):
            left, count = left - len(chunk), count + chunk.count(b"\n")
    return count


def place_of(source: Source, block: Block, number: int, cut: int, columns: tuple[str, ...] = ()) -> str:
    """`file:line` of a line (row) of a block's segment, where it has that number."""
    before = lines_before(source, block.segment, cut, columns) if block.before is None else block.before
    return f"{source.name}:{before + number + source.first_number}"


def first_lines(blocks: Iterable[Block], count: int) -> Iterator[Block]:
    """The first `count` lines that are not blank (rows) of one source; the source then ends where they do."""
    left = count
    for block in blocks:
        if block.ends or left <= 0:
            yield block
            continue
        if block.is_arrow:
            data, rows = table_files.head(block.data, left)
            left -= rows
        else:
            lines = block.data.splitlines(keepends=True)
            full = itertools.accumulate(bool(line.strip()) for line in lines)
            upto = sum(1 for number in full if number < left) + 1
            data = b"".join(lines[:upto])
            left -= sum(bool(line.strip()) for line in lines[:upto])
        yield Block(block.source, block.segment, block.first, data, block.advance, block.before, block.is_arrow)
        if left <= 0:
            yield Block(block.source, block.segment, 0, b"", ends="segment")
            yield Block(block.source, block.segment + 1, 0, b"", ends="source")
            return


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
        yield Block(index, k, 0, b"", ends="segment")
    yield Block(index, segments, 0, b"", ends="source")


def _line_start(file: Any, offset: int) -> int:
    """The offset of the first line that begins at `offset` or after; the file's size where none does."""
    if offset == 0 or offset >= (size := file.seek(0, 2)):
        return size if offset else 0
    file.seek(offset - 1)
    at = offset - 1
    while chunk := file.read(1 << 16):
        if (found := chunk.find(b"\n")) >= 0:
            return at + found + 1
        at += len(chunk)
    return at


def _read_file(path: Path, index: int, cut: int, wanted: Callable[[int], bool], block_bytes: int) -> Iterator[Block]:
    with open(path, "rb") as file:
        segments = max(1, -(-file.seek(0, 2) // cut))
        for k in filter(wanted, range(segments)):
            start, end = _line_start(file, k * cut), _line_start(file, (k + 1) * cut)
            file.seek(start)
            line = 0
            for data in _whole_lines(_limited(file, end - start), block_bytes):
                text = data.removeprefix(BOM) if start == 0 and line == 0 else data
                yield Block(index, k, line, text, len(data))
                line += data.count(b"\n")
            yield Block(index, k, 0, b"", ends="segment")
    yield Block(index, segments, 0, b"", ends="source")


def _limited(file: Any, left: int) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        nonlocal left
        chunk = file.read(min(size, left))
        left -= len(chunk)
        return chunk

    return read


def _whole_lines(read: Callable[[int], bytes], block_bytes: int) -> Iterator[bytes]:
    rest: list[bytes] = []
    while True:
        chunk = read(block_bytes)
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
    chunks = _hub_lines(source.hub, columns, block_bytes) if source.hub else _unpacked(source.path, block_bytes)
    for data, advance in chunks:
        at = 0
        while at < len(data):
            while offset + at >= (segment + 1) * cut:
                if wanted(segment):
                    yield Block(index, segment, 0, b"", ends="segment")
                segment, line, before = segment + 1, 0, before + line
            border = (segment + 1) * cut - offset
            # The first line that begins at the border or after: its predecessor ends at border - 1 or after.
            end = len(data) if border >= len(data) else data.find(b"\n", border - 1) + 1 or len(data)
            part = data if end - at == len(data) else data[at:end]
            if wanted(segment):
                text = part.removeprefix(BOM) if offset + at == 0 else part
                yield Block(index, segment, line, text, advance, before)
                advance = 0
            line, at = line + part.count(b"\n"), end
        offset += len(data)
    if wanted(segment):
        yield Block(index, segment, 0, b"", ends="segment")
    yield Block(index, segment + 1, 0, b"", ends="source")


def _hub_lines(shard: table_files.HubShard, columns: tuple[str, ...], block_bytes: int) -> Iterator[tuple[bytes, int]]:
    lines, size = [], 0
    for line in table_files.hub_lines(shard, columns):
        lines.append(line)
        size += len(line)
        if size >= block_bytes:
            yield b"".join(lines), 0
            lines, size = [], 0
    if lines:
        yield b"".join(lines), 0


def _unpacked(path: Path, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(whole lines, bytes of the file that they took) of a compressed file."""
    import zstandard

    line, at = 1, 0
    kind = "gzip" if path.suffix == ".gz" else "zstd"
    with open(path, "rb") as raw:
        if kind == "gzip":
            stream: Any = gzip.open(raw)  # noqa: SIM115 - holds nothing but `raw`
        else:
            stream = _CheckedZstd(raw, zstandard)
        lines = _whole_lines(stream.read, block_bytes)
        while True:
            try:
                data = next(lines, b"")
            except gzip.BadGzipFile as error:
                raise ValueError(f"{path}:{line}: not gzip, though its name ends in .gz: {error}") from error
            except (EOFError, zlib.error, zstandard.ZstdError) as error:
                raise ValueError(f"{path}:{line}: the {kind} stream breaks off near this line: {error}") from error
            if not data:
                return
            here = raw.tell()
            yield data, here - at
            line, at = line + data.count(b"\n"), here


class _CheckedZstd:
    """Reads all frames of a zstd file. The library's own reader takes a file that is cut short for a shorter one."""

    def __init__(self, raw: Any, zstandard: Any) -> None:
        self._raw, self._library = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._inside = bytearray(), False

    def read(self, size: int) -> bytes:
        while len(self._ready) < size:
            fed = self._raw.read(1 << 16)
            if not fed:
                if self._inside:
                    raise self._library.ZstdError("the file ends inside a frame")
                break
            while fed:
                self._inside = True
                self._ready += self._frame.decompress(fed)
                if not self._frame.eof:
                    break
                fed, self._inside = self._frame.unused_data, False
                self._frame = self._library.ZstdDecompressor().decompressobj()
        found = bytes(self._ready[:size])
        del self._ready[:size]
        return found
