"""Arrow shards: how tokenised rows lie on disk, and the memory-mapped reader that training runs on.

A folder holds `manifest.json` and one or two tables, each cut into Arrow IPC files `TABLE-SOURCE-SEGMENT.arrow`:

    pretrain   texts     ids: list<uint16|int32>, words: list<uint16|int32>, the word of each token (0, 1, 2, ...)
    finetune   passages  ids: list<uint16|int32>, hash: uint64, xxh3_64 of the raw text: finds equal texts on any rank
               groups    query: list<uint16|int32>, pos and neg: list<int64> rows of `passages`,
                         pos_scores and neg_scores: list<float32> or null, type and prompt: string or null

A segment is a stretch of one input (`input_files.py`), and its files are complete in themselves: `pos` and `neg` count from
the first row of the segment's own passages, among which each text is stored once. So writing needs memory for one
segment, and files are put together without touching them; the reader adds where a segment's passages begin. With a
corpus (`--corpus`, and what `bge_ds.mine` writes) `pos` and `neg` are rows of the whole table of passages.

`ids` hold the special tokens and are cut to the length that the manifest names. Buffers are not compressed, so that a
row is a slice of the mapped file: a shard is mapped when a row of it is first asked for, and all processes of a host
share the pages. The price is disk space, halved by uint16 ids where the vocabulary allows it.

The manifest is written last, into a folder that gets its final name by one rename: a folder with a manifest is whole.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards.manifest_file import MANIFEST, Manifest, join_manifests, read_manifest
from bge_ds.data.shards.memory_map import MappedTable

SHARD_BYTES = 256 << 20  # of the input, a segment


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


# ---------------------------------------------------------------------------------------------------------- reading


class Group(NamedTuple):
    """One line of fine-tuning data: a query's ids, and rows of passages with a teacher's score (float32) each, or None."""

    query: np.ndarray
    pos: np.ndarray
    neg: np.ndarray
    pos_scores: np.ndarray | None
    neg_scores: np.ndarray | None


class _Shards:
    """What both kinds share: folders of shards read as if made as one, rows of the second after those of the first, and so on.

    Pickling (a spawned loader worker) carries the paths only."""

    def __init__(self, folders: list[Path], manifests: list[Manifest]) -> None:
        self.folders, self.manifests, self.manifest = folders, manifests, join_manifests(manifests)
        self.fingerprint: str = self.manifest.fingerprint
        made = [schemas(one.kind, one.tokenizer.vocab_size, one.max_seq_length or 0) for one in manifests]
        self._tables = {
            name: MappedTable(name, [(f, of[name], one.shards) for f, of, one in zip(folders, made, manifests, strict=True)])
            for name in made[0]
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return open_folders, (self.folders,)

    def length_counts(self, table: str, column: str) -> np.ndarray:
        """How many rows of a table have each number of values in a list column, int64: element n counts those of n values.

        From the offsets, a record batch at a time: no value is read."""
        return self._tables[table].length_counts(column)


class PretrainShards(_Shards):
    """Texts as token ids and word numbers."""

    def __len__(self) -> int:
        return self._tables["texts"].rows

    def texts(self, rows_N: np.ndarray) -> tuple[RaggedArrays, RaggedArrays]:
        """(token ids, special ones included, uint16 or int32; the word that each token belongs to) of texts, copied.

        Word numbers never fall, and each special token is a word of its own."""
        found = self._tables["texts"].find(rows_N)
        return found.ragged("ids"), found.ragged("words")

    def ids(self, row: int) -> np.ndarray:
        """Token ids of one text, as a read-only view of its shard."""
        return self._tables["texts"].find(np.array([row])).views("ids")[0]

    def words(self, row: int) -> np.ndarray:
        """The word that each token of one text belongs to, as a read-only view."""
        return self._tables["texts"].find(np.array([row])).views("words")[0]

    def lengths(self, rows_K: np.ndarray) -> np.ndarray:
        """Tokens of each text, special ones included, int64, shape (K,)."""
        return self._tables["texts"].find(rows_K).lengths("ids")


class FinetuneShards(_Shards):
    """Groups of a query, its positives and its negatives; each distinct passage of a segment is stored once."""

    def __init__(self, folders: list[Path], manifests: list[Manifest]) -> None:
        super().__init__(folders, manifests)
        passages, firsts = 0, []
        for folder, manifest in zip(folders, manifests, strict=True):
            begin, own = passages, {}
            for entry in manifest.shards:
                if entry.table == "passages":
                    own[entry.source, entry.segment] = passages
                    passages += entry.rows
            places = [(entry.source, entry.segment) for entry in manifest.shards if entry.table == "groups"]
            if manifest.corpus is None and (lost := [place for place in places if place not in own]):
                raise ValueError(f"{folder / MANIFEST}: no passages for groups of source, segment {lost[0]}: preprocess again")
            firsts += [own[place] if manifest.corpus is None else begin for place in places]
        # Where the passages of each shard of groups begin; those of a corpus are numbered through.
        self._first_passage = np.array(firsts, np.int64)

    def __len__(self) -> int:
        return self._tables["groups"].rows

    @property
    def num_passages(self) -> int:
        return self._tables["passages"].rows

    def queries(self, rows_B: np.ndarray) -> RaggedArrays:
        """Token ids of each group's query, special tokens included, copied."""
        return self._tables["groups"].find(rows_B).ragged("query")

    def passage_rows(self, rows_B: np.ndarray) -> tuple[RaggedArrays, RaggedArrays]:
        """(positives, negatives) of each group: int64 rows of the passage table, copied. Negatives may be none."""
        found = self._tables["groups"].find(rows_B)
        pos, neg = found.ragged("pos"), found.ragged("neg")
        if self._first_passage.any():
            first_B = self._first_passage_of(rows_B)
            for listed in (pos, neg):
                listed.values[...] += np.repeat(first_B, listed.lengths)
        return pos, neg

    def scores(self, rows_B: np.ndarray) -> tuple[RaggedArrays, RaggedArrays]:
        """The teacher's scores (float32) of each group's positives and negatives; an empty array where there are none."""
        found = self._tables["groups"].find(rows_B)
        return found.ragged("pos_scores"), found.ragged("neg_scores")

    def group(self, row: int) -> Group:
        """The group of one input line."""
        table, rows = self._tables["groups"], np.array([row])
        absent = [table.value(name, row) is None for name in ("pos_scores", "neg_scores")]
        scores = (None if none else of.values for none, of in zip(absent, self.scores(rows), strict=True))
        return Group(self.queries(rows).values, *(listed.values for listed in self.passage_rows(rows)), *scores)

    def _first_passage_of(self, rows_B: np.ndarray) -> np.ndarray:
        return self._first_passage[np.searchsorted(self._tables["groups"].starts, rows_B, side="right") - 1]

    def lengths(self, rows_K: np.ndarray, query_max_len: int, passage_max_len: int) -> np.ndarray:
        """Tokens of each group's query and first positive, each cut to its length, int64, shape (K,).

        A stand-in for what a visit computes, whose passages are drawn anew each time; nothing but offsets and rows is read.
        """
        groups = self._tables["groups"].find(rows_K)
        passages_K = groups.firsts("pos") + self._first_passage_of(rows_K)
        queries_K, positives_K = groups.lengths("query"), self._tables["passages"].find(passages_K).lengths("ids")
        return np.minimum(queries_K, query_max_len) + np.minimum(positives_K, passage_max_len)

    def notes(self, row: int) -> tuple[str | None, str | None]:
        """(type, prompt) of a group: None where its line gave none."""
        return self._tables["groups"].value("type", row), self._tables["groups"].value("prompt", row)

    def group_shards(self) -> Iterator[tuple[int, list[pa.RecordBatch]]]:
        """Of each shard of groups in order: (the passage that its `pos` and `neg` count from, its record batches, mapped)."""
        for k, first in enumerate(self._first_passage.tolist()):
            yield first, self._tables["groups"].shard(k).batches

    def distinct(self, column: str) -> set[str]:
        """The texts that groups have in a column, `type` or `prompt`; from null counts alone where no group has one."""
        table, found = self._tables["groups"], set()
        for k in range(len(table.starts)):
            for batch in table.shard(k).batches:
                held = batch.column(column)
                found |= set(held.unique().to_pylist()) if held.null_count < len(held) else set()
        return found - {None}

    def scored(self) -> list[tuple[int, int | None]]:
        """Of each input file: how many of its groups have a teacher's scores for all passages, and the first that has not."""
        table, ends = self._tables["groups"], np.array([source.rows[1] for source in self.manifest.sources])
        lacking: dict[int, list[int]] = {}
        for k, first in enumerate(table.starts.tolist()):
            shard = table.shard(k)
            for start, batch in zip(shard.starts_B.tolist(), shard.batches, strict=True):
                columns = [batch.column(name) for name in ("pos_scores", "neg_scores")]
                if not any(column.null_count for column in columns):
                    continue
                no_pos, no_neg = (column.is_null().to_numpy(zero_copy_only=False) for column in columns)
                rows = np.flatnonzero(no_pos | (no_neg & (np.diff(batch.column("neg").offsets.to_numpy()) > 0))) + first + start
                if len(rows):
                    found = lacking.setdefault(int(np.searchsorted(ends, rows[0], side="right")), [0, int(rows[0])])
                    found[0] += len(rows)
        return [
            (source.rows[1] - source.rows[0] - lacking.get(k, [0])[0], lacking[k][1] if k in lacking else None)
            for k, source in enumerate(self.manifest.sources)
        ]

    def passages(self, prows_K: np.ndarray) -> RaggedArrays:
        """Token ids of passages, special tokens included, copied."""
        return self._tables["passages"].find(prows_K).ragged("ids")

    def passage(self, prow: int) -> np.ndarray:
        """Token ids of one passage, as a read-only view of its shard."""
        return self._tables["passages"].find(np.array([prow])).views("ids")[0]

    def hashes(self, prows: np.ndarray) -> np.ndarray:
        """Content hashes of passages, uint64, of the shape of `prows`; equal raw texts have equal hashes."""
        rows = np.asarray(prows, np.int64).ravel()
        return self._tables["passages"].find(rows).numbers("hash").reshape(np.shape(prows))


def open_folder(folder: str | Path) -> PretrainShards | FinetuneShards:
    """Opens a folder of shards, see `open_folders`."""
    return open_folders([folder])


def open_folders(folders: Sequence[str | Path]) -> PretrainShards | FinetuneShards:
    """Opens folders of shards as one. Checks the schema version and each shard's size; maps nothing yet.

    Raises ValueError that names the shard which is missing or cut short, or the folders that are of different kinds or
    tokenizers; a shard of other columns or rows is named when a row of it is first asked for."""
    folders = [Path(folder) for folder in folders]
    first, *others = manifests = [read_manifest(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        for name, of in (("kind", lambda made: made.kind), ("tokenizer", lambda made: made.tokenizer.fingerprint)):
            if of(other) != of(first):
                raise ValueError(
                    f"{folders[0]} and {folder} do not go together, each has a {name} of its own: give folders of one {name},"
                    " or preprocess again"
                )
    return (PretrainShards if first.kind == "pretrain" else FinetuneShards)(folders, manifests)
