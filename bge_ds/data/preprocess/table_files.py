"""Inputs that come as rows: Parquet, Arrow files and streams, `datasets.save_to_disk` folders, hub data sets.

All but the hub's are reached at any row: a segment of a table is a range of rows. Rows travel to the workers as Arrow,
so that turning them into Python objects is the workers' part. A hub data set is streamed: nothing of it is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet

ENDINGS = (".parquet", ".arrow")
HUB = "hf://"
HUB_SYNTAX = "hf://NAME[:CONFIG][@SPLIT]"


class InputTable:
    """The rows of a Parquet file, an Arrow file or stream, or a folder of `datasets.save_to_disk`. columns: none is all.

    Raises ValueError for a table that cannot be read or has none of the columns asked for."""

    def __init__(self, path: Path, is_dataset: bool, columns: tuple[str, ...]) -> None:
        self.path, self.is_dataset, self.is_parquet = path, is_dataset, path.suffix == ".parquet" and not is_dataset
        try:
            self._open()
        except Exception as error:  # whatever the libraries make of a broken file
            library = "datasets cannot load this folder" if is_dataset else "cannot be read as a table"
            raise ValueError(f"{path}: {library}: {error}") from error
        self.columns = [name for name in columns or self.names if name in self.names]
        if columns and not self.columns:
            wanted, held = ", ".join(columns), ", ".join(self.names)
            raise ValueError(f"{path}: none of the columns {wanted}; it has {held}: name them by --columns field=column")

    def _open(self) -> None:
        if self.is_dataset:
            import datasets  # seconds to import, and most inputs are files

            self._data = datasets.load_from_disk(str(self.path))
            self.rows, self.names = len(self._data), list(self._data.column_names)
            self.num_bytes = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        elif self.is_parquet:
            self._data = pa.parquet.ParquetFile(self.path, memory_map=True)
            held = self._data.metadata
            self.groups = [held.row_group(i).num_rows for i in range(held.num_row_groups)]
            self.rows, self.names = held.num_rows, self._data.schema_arrow.names
            self.num_bytes = sum(held.row_group(i).total_byte_size for i in range(held.num_row_groups))
        else:
            batches = self._arrow_batches()
            self.names = next(batches)
            self.rows = sum(batch.num_rows for batch in batches)
            self.num_bytes = self.path.stat().st_size

    def segment_rows(self, cut: int) -> int:
        """Rows of a segment of about `cut` bytes."""
        return max(1, self.rows * cut // max(1, self.num_bytes))

    def read(self, first: int, last: int, block_bytes: int) -> Iterator[tuple[int, bytes]]:
        """(number of rows, the rows as an Arrow stream) of rows [first, last), in pieces of about `block_bytes`."""
        step = min(1000, self.segment_rows(block_bytes))
        at = first
        try:
            for batch in self._batches(first, last, step):
                if not self.is_dataset:
                    batch = batch.select(self.columns)
                for start in range(0, batch.num_rows, step):
                    piece = batch.slice(start, step)
                    yield piece.num_rows, to_bytes(piece)
                    at += piece.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}:{at}: the table cannot be read from this row on: {error}") from error

    def _batches(self, first: int, last: int, step: int) -> Iterator[pa.RecordBatch]:
        if self.is_dataset:
            data = self._data.select_columns(self.columns).with_format("arrow")
            for start in range(first, last, step):
                yield from data[start : min(start + step, last)].combine_chunks().to_batches()
            return
        if not self.is_parquet:
            batches = self._arrow_batches()
            next(batches)
            yield from _between(batches, 0, first, last)
            return
        start, chosen, skipped = 0, [], 0
        for i, rows in enumerate(self.groups):
            if start + rows <= first:
                skipped = start + rows
            elif start < last:
                chosen.append(i)
            start += rows
        # One row group after another: columns are decoded `step` rows at a time, never a whole group.
        batches = self._data.iter_batches(step, row_groups=chosen, columns=self.columns, use_threads=False)
        yield from _between(batches, skipped, first, last)

    def _arrow_batches(self) -> Iterator[Any]:
        """The names of the columns, then the record batches: views of the mapped file."""
        with pa.memory_map(str(self.path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            yield reader.schema.names
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader


def _between(batches: Iterator[pa.RecordBatch], at: int, first: int, last: int) -> Iterator[pa.RecordBatch]:
    """Rows [first, last) of batches whose first row has the number `at`."""
    for batch in batches:
        if at >= last:
            return
        start, end = max(first - at, 0), min(last - at, batch.num_rows)
        if start < end:
            yield batch.slice(start, end - start)
        at += batch.num_rows


def to_bytes(batch: pa.RecordBatch) -> bytes:
    """A record batch as an Arrow stream: only the rows of a slice, not what it is a slice of."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> list[dict[str, Any] | ValueError]:
    """The rows of `to_bytes` as Python objects, or one ValueError; a column that is null counts as absent."""
    try:
        rows = pa.ipc.open_stream(data).read_all().to_pylist()
    except (ValueError, pa.ArrowException) as error:
        return [ValueError(f"the rows from here on cannot be decoded: {error}")]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def head(data: bytes, rows: int) -> tuple[bytes, int]:
    """The first rows of what `to_bytes` gave, and how many there are."""
    batch = pa.ipc.open_stream(data).read_next_batch().slice(0, rows)
    return to_bytes(batch), batch.num_rows


# -------------------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class HubShard:
    """One shard of a hub data set's split: what the hub keeps as one file."""

    name: str
    config: str | None
    split: str
    number: int
    revision: str  # changes with the data set's files

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{HUB}{self.name}{config}@{self.split}#{self.number}"


def hub_shards(given: str) -> list[HubShard]:
    """The shards of a data set named as HUB_SYNTAX; the split is `train` where none is given.

    Raises ValueError where `datasets` finds no such set, configuration or split."""
    name, _, split = given.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    try:
        builder = _builder(name, config or None)
        data = _stream(builder, split or "train", given)
    except ValueError:
        raise
    except Exception as error:  # network, missing set, missing configuration: each library its own class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{given}: datasets cannot load it: {reason}: the form is {HUB_SYNTAX}") from error
    revision = f"{builder.hash or ''}-{builder.config_id}"
    return [HubShard(name, config or None, split or "train", i, revision) for i in range(max(1, data.num_shards))]


def hub_lines(shard: HubShard, columns: tuple[str, ...], block_bytes: int) -> Iterator[bytes]:
    """The rows of a shard as JSON lines, of the columns asked for where the set has them, `block_bytes` or more at a time."""
    data = _stream(_builder(shard.name, shard.config), shard.split, str(shard))
    if data.num_shards > 1:
        data = data.shard(data.num_shards, shard.number)
    block = bytearray()
    try:
        for row in data:
            held = {name: row[name] for name in columns if row.get(name) is not None} if columns else row
            block += orjson.dumps(held, option=orjson.OPT_APPEND_NEWLINE)
            if len(block) >= block_bytes:
                yield bytes(block)
                block.clear()
    except (OSError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{shard}: the stream breaks off: {error}: run the same command again to continue") from error
    if block:
        yield bytes(block)


def _builder(name: str, config: str | None) -> Any:
    import datasets

    return datasets.load_dataset_builder(name, config)


def _stream(builder: Any, split: str, given: str) -> Any:
    splits = builder.as_streaming_dataset()
    if split not in splits:
        raise ValueError(f"{given}: no split {split!r}: it has {', '.join(splits)}; the form is {HUB_SYNTAX}")
    return splits[split]
