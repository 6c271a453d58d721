"""Arrow shards: how tokenised rows lie on disk, and the memory-mapped reader that training runs on.

A folder holds `manifest.json` and one or two tables, each cut into Arrow IPC files `TABLE-SOURCE-SEGMENT.arrow`:

    pretrain   texts     ids: list<uint16|int32>, words: list<uint16|int32>, the word of each token (0, 1, 2, ...)
    finetune   passages  ids: list<uint16|int32>, hash: uint64, xxh3_64 of the raw text: finds equal texts on any rank
               groups    query: list<uint16|int32>, pos and neg: list<int64> rows of `passages`,
                         pos_scores and neg_scores: list<float32> or null, type and prompt: string or null

A segment is a stretch of one input (`sources.py`), and its files are complete in themselves: `pos` and `neg` count from
the first row of the segment's own passages, among which each text is stored once. So writing needs memory for one
segment, and files are put together without touching them; the reader adds where a segment's passages begin. With a
corpus (`--corpus`) the passages are the corpus's, and `pos` and `neg` are rows of the whole table.

`ids` hold the special tokens and are cut to the length that the manifest names. Buffers are not compressed, so that a
row is a slice of the mapped file: a shard is mapped when a row of it is first asked for, and all processes of a host
share the pages. The price is disk space, halved by uint16 ids where the vocabulary allows it.

The manifest is written last, into a folder that gets its final name by one rename: a folder with a manifest is whole.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from bge_ds.data.joined import Joined

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
PART = "part.json"  # in place of the manifest, in a part that waits to be merged
TABLES = {"pretrain": ("texts",), "finetune": ("passages", "groups")}
SHARD_BYTES = 256 << 20  # of the input, a segment
MAPPED = 512  # shards of a table that stay mapped: bounds memory, and the maps a process may have


def id_type(limit: int) -> pa.DataType:
    """The Arrow type for values in [0, limit): uint16 where they fit, else int32."""
    return pa.uint16() if limit <= 1 << 16 else pa.int32()


def schemas(kind: str, vocab_size: int, max_seq_length: int = 0) -> dict[str, pa.Schema]:
    """Table name -> Arrow schema, for a kind ("pretrain" or "finetune") and the vocabulary that its ids come from."""
    ids = pa.list_(id_type(vocab_size))
    if kind == "pretrain":
        return {"texts": pa.schema([("ids", ids), ("words", pa.list_(id_type(max_seq_length)))])}
    rows, scores = pa.list_(pa.int64()), pa.list_(pa.float32())
    groups = [("query", ids), ("pos", rows), ("neg", rows), ("pos_scores", scores), ("neg_scores", scores)]
    return {
        "passages": pa.schema([("ids", ids), ("hash", pa.uint64())]),
        "groups": pa.schema([*groups, ("type", pa.string()), ("prompt", pa.string())]),
    }


def list_array(values: np.ndarray, lengths: np.ndarray, value_type: pa.DataType) -> pa.ListArray:
    """A list column from all rows' values end to end, and each row's length."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = values.astype(value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(plain_array(offsets), plain_array(values))


def plain_array(values: np.ndarray) -> pa.Array:
    """Numbers as an Arrow array that shares their memory. `pyarrow.array` would import pandas, half a second."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def hash_file(path: Path, digest: "xxhash.xxh3_128 | None" = None) -> "xxhash.xxh3_128":
    """Feeds a file's bytes to an xxh3_128 digest (a new one by default) and returns the digest."""
    digest = xxhash.xxh3_128() if digest is None else digest
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest


def fingerprint(manifest: dict[str, Any]) -> str:
    """A hash over all in a manifest that decides what a row holds: folders of one fingerprint train alike."""
    # Left out: the version and all names, which may change while every row stays the same.
    content = {key: value for key, value in manifest.items() if key not in ("fingerprint", "bge_ds_version")}
    content["tokenizer"] = manifest["tokenizer"] | {"name": None}
    for key in {"sources", "corpus"} & content.keys():
        content[key] = [source["rows"] for source in manifest[key]]
    return xxhash.xxh3_128_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


# ---------------------------------------------------------------------------------------------------------- reading


class Group(NamedTuple):
    """One line of fine-tuning data. `pos` and `neg` are rows of the passage table, with a score each or None."""

    query: np.ndarray  # token ids
    pos: np.ndarray  # int64
    neg: np.ndarray  # int64, may be empty
    pos_scores: np.ndarray | None  # float32
    neg_scores: np.ndarray | None


class _Lists(NamedTuple):
    """A list column of one record batch, as views of the mapped file."""

    offsets: np.ndarray
    values: np.ndarray
    column: pa.ListArray

    def row(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self, rows_K: np.ndarray) -> np.ndarray:
        return self.offsets[rows_K + 1] - self.offsets[rows_K]

    def row_or_none(self, i: int) -> np.ndarray | None:
        return self.row(i) if self.column.null_count == 0 or self.column[i].is_valid else None


class _Table:
    """The shards of one table. Each is mapped when a row of it is first asked for, and the oldest maps are let go."""

    def __init__(self, folder: Path, table: str, schema: pa.Schema, entries: list[dict[str, Any]]) -> None:
        self.table, self.schema = table, schema
        self.entries = [entry for entry in entries if entry["table"] == table]
        self.paths = [folder / entry["file"] for entry in self.entries]
        for path, entry in zip(self.paths, self.entries, strict=True):
            _check_size(path, entry)
        ends = np.cumsum([0] + [entry["rows"] for entry in self.entries])
        self.starts, self.rows = ends[:-1].tolist(), int(ends[-1])
        self._shards: dict[int, tuple[list[int], list[dict[str, Any]]]] = {}

    def shard(self, k: int) -> tuple[list[int], list[dict[str, Any]]]:
        """(first row of each record batch, columns of each by name) of shard number `k`."""
        return self._shards.get(k) or self._load(k)

    def number(self, row: int) -> int:
        """The shard that holds a row of the table."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of table {self.table}, which has {self.rows} rows")
        return bisect_right(self.starts, row) - 1

    def locate(self, row: int) -> tuple[dict[str, Any], int]:
        """Row of the table -> (columns of its record batch by name, row inside the batch)."""
        k = self.number(row)
        starts, batches = self._shards.get(k) or self._load(k)
        b = bisect_right(starts, row - self.starts[k]) - 1
        return batches[b], row - self.starts[k] - starts[b]

    def lengths(self, column: str, rows_K: np.ndarray) -> np.ndarray:
        """Values in a list column's rows, int64, shape K: differences of offsets, no value is read."""
        return self._gather(rows_K, lambda batch, rows: batch[column].lengths(rows))

    def firsts(self, column: str, rows_K: np.ndarray) -> np.ndarray:
        """The first value in each of a list column's rows, none of which is empty, int64, shape K."""
        return self._gather(rows_K, lambda batch, rows: batch[column].values[batch[column].offsets[rows]])

    def _gather(self, rows_K: np.ndarray, read: Callable[[dict[str, Any], np.ndarray], np.ndarray]) -> np.ndarray:
        """`read`(a record batch's columns, rows inside it) of all rows, int64, in the order asked."""
        order_K = np.argsort(rows_K)
        sorted_K, found_K = rows_K[order_K], np.empty(len(rows_K), np.int64)
        if len(rows_K) and not 0 <= sorted_K[0] <= sorted_K[-1] < self.rows:
            raise IndexError(f"rows {sorted_K[0]} to {sorted_K[-1]} of table {self.table}, which has {self.rows} rows")
        shard_bounds = np.searchsorted(sorted_K, [*self.starts, self.rows])
        for k in np.flatnonzero(np.diff(shard_bounds)):
            starts, batches = self.shard(int(k))
            starts = self.starts[k] + np.array(starts)
            bounds = np.searchsorted(sorted_K, [*starts, self.starts[k] + self.entries[k]["rows"]])
            for b in np.flatnonzero(np.diff(bounds)):
                part = slice(bounds[b], bounds[b + 1])
                found_K[order_K[part]] = read(batches[b], sorted_K[part] - starts[b])
        return found_K

    def length_counts(self, column: str) -> np.ndarray:
        """How many rows have each number of values in a list column, int64: element n counts those of n values."""
        counts = np.zeros(1, np.int64)
        for k in range(len(self.entries)):
            for batch in self.shard(k)[1]:
                more = np.bincount(np.diff(batch[column].offsets), minlength=len(counts))
                more[: len(counts)] += counts
                counts = more
        return counts

    def _load(self, k: int) -> tuple[list[int], list[dict[str, Any]]]:
        starts, batches, rows = [], [], 0
        # The file may be closed again: views of its batches keep the map, and a process may have few open files.
        with pa.memory_map(str(self.paths[k])) as file:
            reader = _open_shard(file, self.paths[k], self.schema)
            try:
                for batch in reader:
                    starts.append(rows)
                    batches.append({name: _view(batch.column(name)) for name in batch.schema.names})
                    rows += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.paths[k]}: corrupted shard ({error}): preprocess again") from error
        if rows != self.entries[k]["rows"]:
            wanted = self.entries[k]["rows"]
            raise ValueError(f"{self.paths[k]}: {rows} rows, the manifest says {wanted}: preprocess again")
        if len(self._shards) >= MAPPED:
            del self._shards[next(iter(self._shards))]
        self._shards[k] = (starts, batches)
        return starts, batches


def _view(column: pa.Array) -> Any:
    if isinstance(column, pa.ListArray):
        return _Lists(column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True), column)
    return column if pa.types.is_string(column.type) else column.to_numpy(zero_copy_only=True)


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, though the manifest names it: copy the folder again, or preprocess again"
        ) from None
    if size != entry["bytes"]:
        wanted = entry["bytes"]
        raise ValueError(f"{path}: corrupted shard, {size} bytes, the manifest says {wanted}: preprocess again")


def _open_shard(file: pa.MemoryMappedFile, path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchStreamReader:
    try:
        reader = pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: corrupted shard, no readable Arrow schema ({error}): preprocess again") from error
    if not reader.schema.equals(schema):
        raise ValueError(f"{path}: its columns are {list(reader.schema)}, not {list(schema)}: preprocess again")
    return reader


class _Shards:
    """What both kinds share. Pickling (a spawned loader worker) carries the path only."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        fields = schemas(manifest["kind"], manifest["tokenizer"]["vocab_size"], manifest.get("max_seq_length", 0))
        self._tables = {name: _Table(folder, name, schema, manifest["shards"]) for name, schema in fields.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_folder, (self.folder,)

    @property
    def folders(self) -> list[Path]:
        """What `open_folders` opens this reader from."""
        return [self.folder]

    def length_counts(self, table: str, column: str) -> np.ndarray:
        """How many rows of a table have each number of values in a list column, int64: element n counts those of n values.

        From the offsets, a record batch at a time: no value is read."""
        return self._tables[table].length_counts(column)


class PretrainShards(_Shards):
    """Texts as token ids and word numbers."""

    def __len__(self) -> int:
        return self._tables["texts"].rows

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a text, special tokens included: a read-only view, uint16 or int32, shape (T,)."""
        batch, i = self._tables["texts"].locate(row)
        return batch["ids"].row(i)

    def words(self, row: int) -> np.ndarray:
        """The word each token belongs to, never falling, shape (T,); each special token is a word of its own."""
        batch, i = self._tables["texts"].locate(row)
        return batch["words"].row(i)

    def lengths(self, rows_K: np.ndarray) -> np.ndarray:
        """Tokens of each text, special ones included, int64, shape (K,)."""
        return self._tables["texts"].lengths("ids", rows_K)


class FinetuneShards(_Shards):
    """Groups of a query, its positives and its negatives; each distinct passage of a segment is stored once."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        groups, passages = self._tables["groups"], self._tables["passages"]
        own = {(e["source"], e["segment"]): start for e, start in zip(passages.entries, passages.starts, strict=True)}
        places = [(entry["source"], entry["segment"]) for entry in groups.entries]
        if "corpus" not in manifest and (lost := [place for place in places if place not in own]):
            raise ValueError(f"{folder / MANIFEST}: no passages for groups of source, segment {lost[0]}: preprocess again")
        # Where the passages of each shard of groups begin; those of a corpus are numbered through.
        self._first_passage = [0 if "corpus" in manifest else own[place] for place in places]

    def __len__(self) -> int:
        return self._tables["groups"].rows

    @property
    def num_passages(self) -> int:
        return self._tables["passages"].rows

    def group(self, row: int) -> Group:
        """The group of an input line; its arrays are read-only views, or small arrays where passages are shifted."""
        table = self._tables["groups"]
        batch, i = table.locate(row)
        first = self._first_passage[bisect_right(table.starts, row) - 1]
        pos, neg = (batch[name].row(i) for name in ("pos", "neg"))
        if first:
            pos, neg = pos + first, neg + first
        return Group(batch["query"].row(i), pos, neg, *(batch[name].row_or_none(i) for name in ("pos_scores", "neg_scores")))

    def lengths(self, rows_K: np.ndarray, query_max_len: int, passage_max_len: int) -> np.ndarray:
        """Tokens of each group's query and first positive, each cut to its length, int64, shape (K,).

        A stand-in for what a visit computes, whose passages are drawn anew each time; nothing but offsets and rows is read.
        """
        groups = self._tables["groups"]
        shard_K = np.searchsorted(groups.starts, rows_K, side="right") - 1
        passages_K = groups.firsts("pos", rows_K) + np.array(self._first_passage, np.int64)[shard_K]
        queries_K, positives_K = groups.lengths("query", rows_K), self._tables["passages"].lengths("ids", passages_K)
        return np.minimum(queries_K, query_max_len) + np.minimum(positives_K, passage_max_len)

    def notes(self, row: int) -> tuple[str | None, str | None]:
        """(type, prompt) of a group: None where its line gave none."""
        batch, i = self._tables["groups"].locate(row)
        return batch["type"][i].as_py(), batch["prompt"][i].as_py()

    def first_without_scores(self) -> int | None:
        """The first group that has no teacher's scores for its positives or its negatives; None: all groups have them."""
        table = self._tables["groups"]
        for k, first in enumerate(table.starts):
            for start, batch in zip(*table.shard(k), strict=True):
                columns = [batch[name].column for name in ("pos_scores", "neg_scores")]
                nulls = [column.is_null().to_numpy(zero_copy_only=False).argmax() for column in columns if column.null_count]
                if nulls:
                    return first + start + int(min(nulls))
        return None

    def passage(self, prow: int) -> np.ndarray:
        """Token ids of a passage, special tokens included: a read-only view, shape (T,)."""
        batch, i = self._tables["passages"].locate(prow)
        return batch["ids"].row(i)

    def passages(self, prows_K: np.ndarray) -> list[np.ndarray]:
        """As `passage`, for many rows at once."""
        return [batch["ids"].row(i) for batch, i in map(self._tables["passages"].locate, prows_K.tolist())]

    def hashes(self, prows: np.ndarray) -> np.ndarray:
        """Content hashes of passages, uint64, of the shape of `prows`; equal raw texts have equal hashes."""
        rows = np.asarray(prows).ravel().tolist()
        found = [batch["hash"][i] for batch, i in map(self._tables["passages"].locate, rows)]
        return np.array(found, dtype=np.uint64).reshape(np.shape(prows))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards. Raises ValueError where there is none, or none that this version can read."""
    path = Path(folder) / MANIFEST
    if not path.is_file() and (Path(folder) / PART).is_file():
        raise ValueError(f"{folder} is one part of several: join them first (python -m bge_ds.preprocess merge)")
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of shards: no {MANIFEST} in it (python -m bge_ds.preprocess makes it)")
    try:
        manifest = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}): preprocess again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema version {version}; this bge_ds reads {SCHEMA_VERSION}: preprocess again")
    if missing := sorted({"kind", "tokenizer", "counts", "sources", "shards", "fingerprint"} - manifest.keys()):
        raise ValueError(f"{path}: {missing[0]} is missing: preprocess again")
    if manifest["kind"] not in TABLES:
        raise ValueError(f"{path}: kind {manifest['kind']!r} is none of {', '.join(TABLES)}")
    return manifest


def open_folder(folder: str | Path) -> PretrainShards | FinetuneShards:
    """Opens a folder of shards. Checks the schema version and each shard's size; maps nothing yet.

    Raises ValueError that names the shard which is missing or cut short; one of other columns or rows is named when
    a row of it is first asked for."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    return (PretrainShards if manifest["kind"] == "pretrain" else FinetuneShards)(folder, manifest)


def open_folders(folders: Sequence[str | Path]) -> PretrainShards | FinetuneShards | Joined:
    """One reader over folders of one kind and tokenizer, as if made as one. Raises ValueError where they do not fit."""
    readers = [open_folder(folder) for folder in folders]
    return readers[0] if len(readers) == 1 else Joined(readers, open_folders)


def verify_folder(folder: str | Path) -> list[str]:
    """Reads every byte: each shard's size, columns, rows and hash, and the manifest's own fingerprint.

    Returns the problems found, each naming its file: none when the folder is as it was written. Raises ValueError
    where the manifest itself cannot be read."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    if fingerprint(manifest) != manifest["fingerprint"]:
        problems.append(f"{folder / MANIFEST}: its fingerprint is not that of its content: it was edited")
    fields = schemas(manifest["kind"], manifest["tokenizer"]["vocab_size"], manifest.get("max_seq_length", 0))
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        try:
            _check_size(path, entry)
            # First the hash: nothing of a shard with a flipped byte is interpreted.
            if (found := hash_file(path).hexdigest()) != entry["hash"]:
                raise ValueError(f"{path}: corrupted shard, hash {found}, the manifest says {entry['hash']}")
            with pa.memory_map(str(path)) as file:
                reader = _open_shard(file, path, fields[entry["table"]])
                rows = sum(batch.num_rows for batch in reader)
                if rows != entry["rows"]:
                    raise ValueError(f"{path}: {rows} rows, the manifest says {entry['rows']}")
        except ValueError as error:
            problems.append(str(error))
    named = {entry["file"] for entry in manifest["shards"]}
    strays = sorted(path for path in folder.glob("*.arrow") if path.name not in named)
    return problems + [f"{path}: the manifest does not name this shard" for path in strays]
