"""The Arrow files of one table, mapped into memory, and many of their rows found at once.

Shapes: K rows asked for, B record batches of a shard.

A row is a stretch of a column's buffer. All buffers of a shard are views of one mapped file, so that a row is known by two
numbers, where it begins and where it ends in the file seen as one array; those of K rows come from a few numpy calls a
shard. Nothing else is kept of a shard than where its record batches lie.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bge_ds.data.ragged import RaggedArrays, stretches
from bge_ds.data.shards.manifest_file import ShardEntry

MAPPED = 512  # shards of a folder's table that stay mapped: bounds memory, and the maps a process may have


class _Column(NamedTuple):
    """A column in the file: `values` is the whole file as an array of the column's type, which starts anew each batch."""

    values: np.ndarray
    values_at_B: np.ndarray  # where a batch's values begin in `values`
    offsets: np.ndarray  # of a list column: the whole file as int32
    offsets_at_B: np.ndarray  # where a batch's offsets begin in `offsets`


class Shard:
    """One mapped file. Raises ValueError where it is no Arrow stream of this schema and so many rows."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int) -> None:
        # The file may be closed again: what lies in its buffer keeps the map, and a process may have few open files.
        with pa.memory_map(str(path)) as file:
            self.buffer = file.read_buffer(file.size())
        try:
            reader = pa.ipc.open_stream(self.buffer)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: corrupted shard, no readable Arrow schema ({error}): preprocess again") from error
        if not reader.schema.equals(schema):
            raise ValueError(f"{path}: its columns are {list(reader.schema)}, not {list(schema)}: preprocess again")
        try:
            self.batches = list(reader)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: corrupted shard ({error}): preprocess again") from error
        ends = np.cumsum([0] + [batch.num_rows for batch in self.batches])
        self.starts_B = ends[:-1]
        if ends[-1] != rows:
            raise ValueError(f"{path}: {ends[-1]} rows, the manifest says {rows}: preprocess again")
        self._columns: dict[str, _Column] = {}

    def column(self, name: str) -> _Column:
        return self._columns.get(name) or self._find(name)

    def _find(self, name: str) -> _Column:
        columns = [batch.column(name) for batch in self.batches]
        is_list = isinstance(columns[0], pa.ListArray) if columns else False
        values = [column.values if is_list else column for column in columns]
        kind = np.dtype(values[0].type.to_pandas_dtype()) if values else np.dtype(np.int64)
        offsets_at = [self._place(column.buffers()[1], 4) for column in columns] if is_list else []
        self._columns[name] = _Column(
            self._as_array(kind),
            np.array([self._place(value.buffers()[1], kind.itemsize) for value in values], np.int64),
            self._as_array(np.dtype(np.int32)),
            np.array(offsets_at, np.int64),
        )
        return self._columns[name]

    def _as_array(self, kind: np.dtype) -> np.ndarray:
        return np.frombuffer(self.buffer, kind, self.buffer.size // kind.itemsize)

    def _place(self, buffer: pa.Buffer | None, itemsize: int) -> int:
        return (buffer.address - self.buffer.address) // itemsize if buffer else 0  # none: there is no value


class MappedTable:
    """The shards of one table, of all folders. Each is mapped when a row of it is first asked for, the oldest are let go."""

    def __init__(self, table: str, folders: Sequence[tuple[Path, pa.Schema, list[ShardEntry]]]) -> None:
        """folders: each with the schema of its table, and its shards, of other tables too."""
        self.table, self._mapped = table, MAPPED * len(folders)
        files = [(path / one.file, schema, one) for path, schema, entries in folders for one in entries if one.table == table]
        self._files: list[tuple[Path, pa.Schema, ShardEntry]] = files
        for path, _, entry in files:
            check_size(path, entry)
        ends = np.cumsum([0] + [entry.rows for _, _, entry in files])
        self.starts, self.rows = ends[:-1], int(ends[-1])
        self._starts = self.starts.tolist()
        self._shards: dict[int, Shard] = {}

    def shard(self, k: int) -> Shard:
        """Shard number `k`. Raises ValueError where its file is not what was written."""
        return self._shards.get(k) or self._load(k)

    def _load(self, k: int) -> Shard:
        path, schema, entry = self._files[k]
        shard = Shard(path, schema, entry.rows)
        if len(self._shards) >= self._mapped:
            del self._shards[next(iter(self._shards))]
        self._shards[k] = shard
        return shard

    def value(self, column: str, row: int) -> Any:
        """One row of any column as a Python object; None where it is null."""
        ((shard, _, batch, within),) = self.find(np.array([row])).parts
        return shard.batches[int(np.ravel(batch)[0])].column(column)[int(within[0])].as_py()

    def length_counts(self, column: str) -> np.ndarray:
        """How many rows have each number of values in a list column, int64: element n counts those of n values."""
        counts = np.zeros(1, np.int64)
        for k in range(len(self._files)):
            for batch in self.shard(k).batches:
                more = np.bincount(np.diff(batch.column(column).offsets.to_numpy()), minlength=len(counts))
                more[: len(counts)] += counts
                counts = more
        return counts

    def find(self, rows_K: np.ndarray) -> Found:
        """Where rows lie. Raises IndexError for a row that the table does not have."""
        if not len(rows_K):
            return Found(0, [])
        least, most = int(rows_K.min()), int(rows_K.max())
        if least < 0 or most >= self.rows:
            wrong = least if least < 0 else most
            raise IndexError(f"row {wrong} of table {self.table}, which has {self.rows} rows")
        first, last = bisect_right(self._starts, least) - 1, bisect_right(self._starts, most) - 1
        if first == last:
            return Found(len(rows_K), [self._within(first, slice(None), rows_K)])
        shard_K = np.searchsorted(self.starts, rows_K, side="right") - 1
        by_shard = np.argsort(shard_K, kind="stable")
        present, begin = np.unique(shard_K[by_shard], return_index=True)
        parts = zip(present.tolist(), np.split(by_shard, begin[1:]), strict=True)
        return Found(len(rows_K), [self._within(k, here, rows_K[here]) for k, here in parts])

    def _within(self, k: int, here: np.ndarray | slice, rows: np.ndarray) -> _Part:
        shard, rows = self.shard(k), rows - self._starts[k]
        if len(shard.starts_B) == 1:
            return _Part(shard, here, 0, rows)
        batch = shard.starts_B.searchsorted(rows, side="right") - 1
        return _Part(shard, here, batch, rows - shard.starts_B[batch])


class _Part(NamedTuple):
    """Rows of one shard: their places among the rows asked for, their record batches, and the rows inside these."""

    shard: Shard
    here: np.ndarray | slice
    batch: np.ndarray | int  # one number where there is one batch
    within: np.ndarray

    def bounds(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the values of a list column, where each row's begin in them, and where they end)."""
        column = self.shard.column(name)
        place, first = column.offsets_at_B[self.batch] + self.within, column.values_at_B[self.batch]
        return column.values, column.offsets[place] + first, column.offsets[place + 1] + first


class Found(NamedTuple):
    """Rows of a table whose places are known; any of their columns is read from here."""

    rows: int
    parts: list[_Part]

    def views(self, column: str) -> list[np.ndarray]:
        """The rows of a list column, as read-only views of the mapped files."""
        found: list[Any] = [None] * self.rows
        for part in self.parts:
            values, begin, end = part.bounds(column)
            places = range(self.rows) if isinstance(part.here, slice) else part.here.tolist()
            for i, a, b in zip(places, begin.tolist(), end.tolist(), strict=True):
                found[i] = values[a:b]
        return found

    def ragged(self, column: str) -> RaggedArrays:
        """The rows of a list column, copied together."""
        if len(self.parts) == 1:
            values, begin, end = self.parts[0].bounds(column)
            lengths = end - begin
            return RaggedArrays(stretches(values, begin, lengths), lengths)
        return RaggedArrays.of(self.views(column)) if self.parts else RaggedArrays(np.empty(0, np.int64), np.empty(0, np.int64))

    def lengths(self, column: str) -> np.ndarray:
        """Values in each row of a list column, int64, shape K: differences of offsets, no value is read."""
        return self._gather(lambda part: np.subtract(*part.bounds(column)[:0:-1]), np.int64)

    def firsts(self, column: str) -> np.ndarray:
        """The first value in each row of a list column, none of which is empty, int64, shape K."""

        def read(part: _Part) -> np.ndarray:
            values, begin, _ = part.bounds(column)
            return values[begin]

        return self._gather(read, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """A column of uint64, shape K."""

        def read(part: _Part) -> np.ndarray:
            column = part.shard.column(name)
            return column.values[column.values_at_B[part.batch] + part.within]

        return self._gather(read, np.uint64)

    def _gather(self, read: Callable[[_Part], np.ndarray], dtype: type) -> np.ndarray:
        found_K = np.empty(self.rows, dtype)
        for part in self.parts:
            found_K[part.here] = read(part)
        return found_K


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raises ValueError where a shard is missing, or of another size than its entry in the manifest says."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, though the manifest names it: copy the folder again, or preprocess again"
        ) from None
    if size != entry.bytes:
        raise ValueError(f"{path}: corrupted shard, {size} bytes, the manifest says {entry.bytes}: preprocess again")
