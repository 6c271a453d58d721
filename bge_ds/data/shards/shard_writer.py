"""Writing: one Arrow file of one segment, and small files that are there whole or not at all."""

import os
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from bge_ds.data.shards.shard_reader import MANIFEST, SCHEMA_VERSION, fingerprint, hash_file

BATCH_BYTES = 4 << 20  # a record batch: small enough for list offsets of 32 bits, large enough that batches are few


class TableWriter:
    """Writes one table of one segment into one file, rows gathered into record batches of BATCH_BYTES."""

    def __init__(self, folder: Path, table: str, schema: pa.Schema, source: int = 0, segment: int = 0) -> None:
        self.schema = schema
        self.path = folder / f"{table}-{source:05d}-{segment:06d}.arrow"
        self._entry = {"table": table, "file": self.path.name, "source": source, "segment": segment, "rows": 0}
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

    def close(self) -> list[dict[str, Any]]:
        """Writes what is pending, down to the disk; returns the file's entry in the manifest, none where no row came."""
        self._flush()
        if self._ipc is None:
            return []
        self._ipc.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self._entry | {"bytes": self.path.stat().st_size, "hash": hash_file(self.path).hexdigest()}]

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
        self._entry["rows"] += table.num_rows
        self._pending, self._pending_bytes = [], 0


def write_whole(path: Path, content: bytes, sync: bool = True) -> None:
    """Writes a small file so that, killed at any moment, there is all of it or nothing under its name.

    With `sync` a power cut changes nothing of that; without it, the file may then be there and empty."""
    draft = path.with_name(f".{path.name}.draft")
    with open(draft, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the schema version and the fingerprint, writes `manifest.json`, returns the manifest. To be called last."""
    manifest = {"schema_version": SCHEMA_VERSION, **manifest}
    manifest["fingerprint"] = fingerprint(manifest)
    write_whole(folder / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    return manifest
