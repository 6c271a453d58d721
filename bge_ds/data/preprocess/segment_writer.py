"""Writing one segment, and the journal that tells which segments are finished.

A folder that is being written holds, beside the Arrow files, a folder `segments`:

    STAGE-SOURCE-SEGMENT.json   a segment's record: its files, counts and skipped lines. Written when its files are on the
                                disk: a segment with a record is finished
    STAGE-SOURCE.json           how many segments a source has, known at its end

Stages are `corpus` and `rows`. A record says nothing of what came before its segment, so a part that reads some
segments, or a run that continues after a kill, writes the same bytes as one that reads all.
"""

import contextlib
from pathlib import Path

import msgspec
import numpy as np
import orjson
import pyarrow as pa

from bge_ds.data.files import write_whole
from bge_ds.data.preprocess import output_folder, validate
from bge_ds.data.preprocess.rows import BlockRows, GroupRows, PassageRows, SegmentRecord, TextRows
from bge_ds.data.preprocess.workers import PreprocessSettings
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards import shard_reader
from bge_ds.data.shards.shard_writer import TableWriter

JOURNAL = output_folder.JOURNAL


class SegmentWriter:
    """Takes the rows of a segment's blocks in order and writes its tables and its record."""

    def __init__(
        self, folder: Path, source: int, segment: int, settings: PreprocessSettings, tokenizer: validate.TokenizerCore
    ) -> None:
        self.folder, self.source, self.segment, self.settings, self.tokenizer = folder, source, segment, settings, tokenizer
        fields = shard_reader.schemas(settings.kind, tokenizer.vocab_size, settings.max_seq_length)
        tables = {"corpus": ("passages",), "by_id": ("groups",)}.get(settings.stage, tuple(fields))
        self.writers = {name: TableWriter(folder, name, fields[name], source, segment) for name in tables}
        self.rows: dict[bytes, int] = {}  # 128-bit hash of a passage of this segment -> its row
        self.good = self.lines = 0
        self.counts = dict.fromkeys(("tokens", "unknown_tokens", "cut_texts", "cut_tokens", "passages", "named", "alone"), 0)
        self.first: int | None = None
        self.skipped: list[tuple[int, str]] = []

    def add(self, block: BlockRows) -> None:
        """Takes the rows of a block. Its bad lines are the caller's to refuse before."""
        self.skipped += block.bad
        self.lines += block.lines
        if not block.good:
            return
        self.first = block.first if self.first is None else self.first
        self.good += block.good
        self._count_cuts(block.cuts)
        match block.rows:
            case TextRows(ids=ids, words=words):
                self._write_ids("texts", ids, self._list_array("texts", "words", RaggedArrays(words, ids.lengths)))
            case PassageRows() as rows:
                self._write_passages(rows)
            case GroupRows() as rows:
                self._write_groups(rows, None if rows.keys is None else self._add_passages(rows))

    def _list_array(self, table: str, column: str, rows: RaggedArrays) -> pa.ListArray:
        return shard_reader.list_array(*rows, self.writers[table].schema.field(column).type.value_type)

    def _write_ids(self, table: str, ids: RaggedArrays, more: pa.Array) -> None:
        self.writers[table].write([self._list_array(table, "ids", ids), more])
        self._count(ids.values)

    def _write_passages(self, rows: PassageRows) -> None:
        self._write_ids("passages", rows.ids, shard_reader.plain_array(rows.hashes))
        self.counts["passages"] += len(rows.hashes)

    def _add_passages(self, rows: GroupRows) -> np.ndarray:
        """Writes the passages that are new to the segment; returns the row of each that the block names."""
        new = np.array([key not in self.rows for key in rows.keys])
        for key in rows.keys:
            self.rows.setdefault(key, len(self.rows))
        assert not (new & ~rows.sent).any(), "a worker left out a passage that no earlier block holds"
        keep, (values, lengths) = new[rows.sent], rows.passages.ids
        if keep.any():
            kept = RaggedArrays(values[np.repeat(keep, lengths)], lengths[keep])
            self._write_passages(PassageRows(kept, rows.passages.hashes[keep]))
        self._count_cuts(rows.passage_cuts[keep])
        return np.array([self.rows[key] for key in rows.keys], dtype=np.int64)

    def _count_cuts(self, tokens: np.ndarray) -> None:
        self.counts["cut_texts"] += int(np.count_nonzero(tokens))
        self.counts["cut_tokens"] += int(tokens.sum())

    def _write_groups(self, rows: GroupRows, at: np.ndarray | None) -> None:
        columns: list[pa.Array] = [self._list_array("groups", "query", rows.queries)]
        for refs in rows.columns[:2]:
            flat, counts = RaggedArrays.of_lists(refs, np.int64)
            columns.append(shard_reader.list_array(flat if at is None else at[flat], counts, pa.int64()))
            self.counts["named"] += len(flat)
        self.counts["alone"] += sum(not len(refs) for refs in rows.columns[1])
        for values, kind in zip(rows.columns[2:], self.writers["groups"].schema.types[3:], strict=True):
            given = any(value is not None for value in values)
            columns.append(pa.array(values, kind) if given else pa.nulls(len(values), kind))
        self.writers["groups"].write(columns)
        self._count(rows.queries.values)

    def _count(self, ids: np.ndarray) -> None:
        self.counts["tokens"] += len(ids)
        if self.tokenizer.unknown_id >= 0:
            self.counts["unknown_tokens"] += int((ids == self.tokenizer.unknown_id).sum())

    def finish(self) -> None:
        """Closes the tables and writes the record: from here on the segment is finished."""
        files = [entry for writer in self.writers.values() for entry in writer.close()]
        # One passage in all of the input would leave nothing to compare: its hash tells, segment by segment.
        only = next(iter(self.rows)).hex() if len(self.rows) == 1 else None
        record = SegmentRecord(
            files=files, rows=self.good, lines=self.lines, skipped=self.skipped, first=self.first, only_passage=only,
            counts=self.counts,
        )  # fmt: skip
        # The shards are on the disk by now; a record that a power cut empties is one segment to make again.
        path = _record_path(self.folder, stage_of(self.settings), self.source, self.segment)
        write_whole(path, msgspec.json.encode(record), sync=False)

    def abort(self) -> None:
        """Closes the open files of a failed run."""
        for writer in self.writers.values():
            writer.abort()


def stage_of(settings: PreprocessSettings) -> str:
    return "corpus" if settings.stage == "corpus" else "rows"


# ---------------------------------------------------------------------------------------------------------- journal


def _record_path(folder: Path, stage: str, source: int, segment: int) -> Path:
    return folder / JOURNAL / f"{stage}-{source:05d}-{segment:06d}.json"


def finished(folder: Path, stage: str, source: int, clean: bool = False) -> set[int]:
    """The segments of a source that have a record, and the files that it names in their sizes, in a folder being written.

    clean: those without a skipped line."""
    found = set()
    for path in (folder / JOURNAL).glob(f"{stage}-{source:05d}-*.json"):
        with contextlib.suppress(OSError, ValueError):
            record = _read_record(path)
            whole = all((folder / entry.file).stat().st_size == entry.bytes for entry in record.files)
            if whole and not (clean and record.skipped):
                found.add(int(path.stem.rpartition("-")[2]))
    return found


def end_source(folder: Path, stage: str, source: int, segments: int) -> None:
    """Notes how many segments a source has."""
    write_whole(folder / JOURNAL / f"{stage}-{source:05d}.json", orjson.dumps({"segments": segments}), sync=False)


def count_segments(folder: Path, stage: str, source: int) -> int | None:
    """How many segments a source has, None where its end was not reached yet."""
    path = folder / JOURNAL / f"{stage}-{source:05d}.json"
    try:
        return int(orjson.loads(path.read_bytes())["segments"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_record(folder: Path, stage: str, source: int, segment: int) -> SegmentRecord:
    """The record of a finished segment."""
    return _read_record(_record_path(folder, stage, source, segment))


def _read_record(path: Path) -> SegmentRecord:
    try:
        return msgspec.json.decode(path.read_bytes(), type=SegmentRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}: copy the part again, or make it again") from None
