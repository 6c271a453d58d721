"""Writing one Arrow file of one segment."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from bge_ds.data.files import hash_file
from bge_ds.data.shards.manifest_file import ShardEntry

BATCH_BYTES = 4 << 20  # a record batch: small enough for list offsets of 32 bits, large enough that batches are few


class TableWriter:
    """Writes one table of one segment into one file, rows gathered into record batches of BATCH_BYTES."""

    def __init__(self, folder: Path, table: str, schema: pa.Schema, source: int = 0, segment: int = 0) -> None:
        self.schema = schema
        self.path = folder / f"{table}-{source:05d}-{segment:06d}.arrow"
        self._table, self._source, self._segment, self._rows = table, source, segment, 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._file: Any = None
        self._ipc: Any = None

    def write(self, columns: list[pa.Array]) -> None:
        """Appends rows given as one array for each field of the schema."""
        batch = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        if self._pending_bytes >= BATCH_BYTES:
            self._flush()

    def close(self) -> list[ShardEntry]:
        """Writes what is pending, down to the disk; returns the file's entry in the manifest, none where no row came."""
        self._flush()
        if self._ipc is None:
            return []
        self._ipc.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size, digest = self.path.stat().st_size, hash_file(self.path)
        entry = ShardEntry(
            table=self._table, file=self.path.name, source=self._source, segment=self._segment, rows=self._rows, bytes=size,
            hash=digest,
        )  # fmt: skip
        return [entry]

    def abort(self) -> None:
        """Lets go of the open file, so that a failed run can remove its folder."""
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._ipc is None:
            self._file = open(self.path, "wb")  # noqa: SIM115 - closed by close or abort
            self._ipc = pa.ipc.new_stream(self._file, self.schema)  # what `datasets.Dataset.from_file` opens
        table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
        self._ipc.write_table(table)
        self._rows += table.num_rows
        self._pending, self._pending_bytes = [], 0
