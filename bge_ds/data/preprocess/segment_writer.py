"""Writing one segment, and the journal that tells which segments are finished.

A folder that is being written holds, beside the Arrow files, a folder `segments`:

    STAGE-SOURCE-SEGMENT.json            a segment's record: its files, rows, lines, counts. Written, to the disk, when its
                                         files are there: a segment with a record is finished
    STAGE-SOURCE-SEGMENT.skipped.jsonl   its skipped lines, numbered within the segment
    STAGE-SOURCE.json                    how many segments a source has, known at its end

Stages are `corpus` and `rows`. A record says nothing of what came before its segment, so a part that reads some
segments, or a run that goes on after a kill, writes the same bytes as one that reads all.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pyarrow as pa

from bge_ds.data.files import write_whole
from bge_ds.data.preprocess import output_folder, validate
from bge_ds.data.preprocess.rows import BlockRows, GroupRows, PassageRows, SegmentRecord, SkippedLine, TextRows
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
        self.good = self.lines = self.tokens = self.unknown = self.cut = self.named = self.alone = 0
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
        self.cut += block.cuts
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
        self.cut += int(rows.passage_cuts[keep].sum())
        return np.array([self.rows[key] for key in rows.keys], dtype=np.int64)

    def _write_groups(self, rows: GroupRows, at: np.ndarray | None) -> None:
        columns: list[pa.Array] = [self._list_array("groups", "query", rows.queries)]
        for refs in rows.columns[:2]:
            counts = np.fromiter(map(len, refs), dtype=np.int64, count=len(refs))
            flat = np.fromiter(itertools.chain.from_iterable(refs), dtype=np.int64, count=int(counts.sum()))
            columns.append(shard_reader.list_array(flat if at is None else at[flat], counts, pa.int64()))
            self.named += len(flat)
        self.alone += sum(not len(refs) for refs in rows.columns[1])
        for values, kind in zip(rows.columns[2:], self.writers["groups"].schema.types[3:], strict=True):
            given = any(value is not None for value in values)
            columns.append(pa.array(values, kind) if given else pa.nulls(len(values), kind))
        self.writers["groups"].write(columns)
        self._count(rows.queries.values)

    def _count(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        self.unknown += int((ids == self.tokenizer.unknown_id).sum()) if self.tokenizer.unknown_id >= 0 else 0

    def finish(self) -> None:
        """Closes the tables and writes the record: from here on the segment is finished."""
        files = [entry for writer in self.writers.values() for entry in writer.close()]
        name = f"{stage_of(self.settings)}-{self.source:05d}-{self.segment:06d}"
        if self.skipped:
            lines = (orjson.dumps({"line": line, "reason": reason}) + b"\n" for line, reason in self.skipped)
            write_whole(self.folder / JOURNAL / f"{name}.skipped.jsonl", b"".join(lines))
        groups: dict[str, Any] = {}
        if self.settings.form == "finetune":
            # One passage in all of the input would leave nothing to compare: its hash tells, segment by segment.
            groups = {"passages": len(self.rows), "only_passage": None}
            if len(self.rows) == 1:
                groups["only_passage"] = next(iter(self.rows)).hex()
        if self.settings.form in ("finetune", "by_id"):
            groups |= {"named": self.named, "alone": self.alone}
        record = SegmentRecord(
            files=files, rows=self.good, lines=self.lines, skipped=len(self.skipped), first=self.first,
            tokens=self.tokens, unknown_tokens=self.unknown, cut_texts=self.cut, **groups,
        )  # fmt: skip
        # The shards are on the disk by now; a record that a power cut empties is one segment to make again.
        write_whole(self.folder / JOURNAL / f"{name}.json", msgspec.json.encode(record), sync=False)

    def abort(self) -> None:
        """Closes the open files of a failed run."""
        for writer in self.writers.values():
            writer.abort()


def stage_of(settings: PreprocessSettings) -> str:
    return "corpus" if settings.stage == "corpus" else "rows"


# ---------------------------------------------------------------------------------------------------------- journal


def finished(folder: Path, stage: str, source: int, clean: bool = False) -> set[int]:
    """The finished segments of a source in a folder that is being written; `clean`: those without a skipped line."""
    names = {path.name for path in (folder / JOURNAL).glob(f"{stage}-{source:05d}-*")}
    found = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    if clean:
        found = {name for name in found if f"{name}.skipped.jsonl" not in names}
    return {int(name.rpartition("-")[2]) for name in found if _is_whole(folder, folder / JOURNAL / f"{name}.json")}


def _is_whole(folder: Path, path: Path) -> bool:
    """Whether a record and the files that it names are there, in their sizes."""
    try:
        files = _read_record(path).files
        return all((folder / entry.file).stat().st_size == entry.bytes for entry in files)
    except (OSError, ValueError):
        return False


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
    return _read_record(folder / JOURNAL / f"{stage}-{source:05d}-{segment:06d}.json")


def _read_record(path: Path) -> SegmentRecord:
    return _decode(path.read_bytes(), SegmentRecord, path)


def _decode(line: bytes, kind: type, path: Path) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}: copy the part again, or make it again") from None


def read_skipped(folder: Path, stage: str, source: int, segment: int) -> Iterator[SkippedLine]:
    """The skipped lines of a finished segment."""
    path = folder / JOURNAL / f"{stage}-{source:05d}-{segment:06d}.skipped.jsonl"
    with open(path, "rb") as file:
        yield from (_decode(line, SkippedLine, path) for line in file)
