"""Vectors on disk, as `bge_ds.encode` writes them: opened at once, whatever their number, and read where they are looked at.

Shapes: N vectors of D features; K of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from bge_ds.checkpoint import filesystem
from bge_ds.encoding.manifest import Manifest, read_manifest
from bge_ds.encoding.number_formats import from_stored

_OPEN = 64  # blocks that are kept mapped


class Vectors:
    """N vectors of D features in blocks of files that are mapped into memory; row n is the n-th text of the input.

    `vectors[5]`, `vectors[10:20]` and `vectors[[3, 1, 4]]` are float32 arrays, whatever is stored. `ids`: the texts' `_id`, or
    None. manifest: the settings, counts and hashes.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError for a folder that is unfinished, or a file that is missing or of another size than was written."""
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        for block in self.manifest.blocks:
            for entry in block.files:
                path = self.folder / entry.file
                if not path.is_file() or path.stat().st_size != entry.bytes:
                    raise ValueError(f"{path} is missing or has not the {entry.bytes:,} bytes that were written: copy it again")
        self.shape = self.manifest.input.texts, self.manifest.settings.dim
        self.dtype = self.manifest.settings.dtype
        self.stored = lru_cache(_OPEN)(self._stored)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | list[int] | np.ndarray) -> np.ndarray:
        """The vectors of these rows, float32: D for one row, K x D for a slice, a list or an array."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        wanted = np.asarray(rows, np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows are from 0 to {len(self) - 1}")
        rows_K = np.atleast_1d(wanted) % max(1, len(self))
        found_KD = np.empty((len(rows_K), self.shape[1]), np.float32)
        block_K = rows_K // self.manifest.block_texts
        for block in np.unique(block_K).tolist():
            at = np.flatnonzero(block_K == block)
            stored_ND, scales_N = self.stored(block)
            own = rows_K[at] - block * self.manifest.block_texts
            found_KD[at] = from_stored(stored_ND[own], None if scales_N is None else scales_N[own], self.dtype)
        return found_KD if wanted.ndim else found_KD[0]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(row of the first vector, N x D float32) of each block in order; float32 ones are views of the mapped file."""
        for block in range(self.manifest.num_blocks):
            yield block * self.manifest.block_texts, from_stored(*self._stored(block), self.dtype)

    def _stored(self, block: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(vectors as they are stored, see `number_formats`, mapped; scales of int8, or None) of a block."""
        names = {entry.file.split("-")[0]: entry.file for entry in self.manifest.blocks[block].files}
        scales = np.load(self.folder / names["scales"], mmap_mode="r") if "scales" in names else None
        return np.load(self.folder / names["vectors"], mmap_mode="r"), scales

    @property
    def ids(self) -> pa.ChunkedArray | None:
        """The `_id` of each row, mapped (`vectors.ids[5].as_py()`); None where the input had none."""
        if not self.manifest.input.has_ids:
            return None
        files = [entry.file for block in self.manifest.blocks for entry in block.files if entry.file.endswith(".arrow")]
        columns = [pa.ipc.open_stream(pa.memory_map(str(self.folder / file))).read_all()["_id"] for file in files]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def table(self) -> pa.Table:
        """All rows as an Arrow table that copies nothing: `_id` where there is one, `vector` as stored, `scale` of int8.

        `datasets.Dataset(vectors.table())` opens it."""
        chunks, scales = [], []
        for block in range(self.manifest.num_blocks):
            stored_ND, scales_N = self._stored(block)
            chunks.append(pa.FixedSizeListArray.from_arrays(_mapped(stored_ND.reshape(-1)), self.shape[1]))
            scales += [] if scales_N is None else [_mapped(scales_N)]
        columns = {"_id": self.ids} if self.manifest.input.has_ids else {}
        columns |= {"vector": pa.chunked_array(chunks)} | ({"scale": pa.chunked_array(scales)} if scales else {})
        return pa.table(columns)

    def verify(self) -> list[str]:
        """Reads every byte; what is wrong, each naming its file: none where the folder is as it was written."""
        entries = (entry for block in self.manifest.blocks for entry in block.files)
        found = (filesystem.damage(self.folder / entry.file, entry.bytes, entry.hash) for entry in entries)
        return [problem for problem in found if problem]


def open_vectors(folder: str | Path) -> Vectors:
    """Opens a folder that `bge_ds.encode` wrote. Raises ValueError for one that is unfinished or lacks a file."""
    return Vectors(folder)


def _mapped(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])
