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

import numpy as np
import orjson
import pyarrow as pa

from bge_ds.data.preprocess import output_folder, validate
from bge_ds.data.preprocess.workers import Settings
from bge_ds.data.shards import shard_reader
from bge_ds.data.shards.shard_writer import TableWriter, write_whole

JOURNAL = output_folder.JOURNAL


class SegmentWriter:
    """Takes the rows of a segment's blocks in order and writes its tables and its record."""

    def __init__(self, folder: Path, source: int, segment: int, settings: Settings, tokenizer: validate.TokenizerCore) -> None:
        self.folder, self.source, self.segment, self.settings, self.tokenizer = folder, source, segment, settings, tokenizer
        fields = shard_reader.schemas(settings.kind, tokenizer.vocab_size, settings.max_seq_length)
        tables = {"corpus": ("passages",), "by_id": ("groups",)}.get(settings.stage, tuple(fields))
        self.writers = {name: TableWriter(folder, name, fields[name], source, segment) for name in tables}
        self.rows: dict[bytes, int] = {}  # 128-bit hash of a passage of this segment -> its row
        self.good = self.lines = self.tokens = self.unknown = self.cut = self.named = self.alone = 0
        self.first: int | None = None
        self.skipped: list[tuple[int, str]] = []

    def add(self, result: dict[str, Any]) -> None:
        """Takes the rows of a block. Its bad lines are the caller's to refuse before."""
        self.skipped += result["bad"]
        self.lines += result["lines"]
        if not result["good"]:
            return
        self.first = result["first"] if self.first is None else self.first
        self.good += result["good"]
        self.cut += int(result["cuts"])
        form = self.settings.form
        if form == "pretrain":
            self._add_lists("texts", result, ("ids", "words"), [])
        elif form == "corpus":
            self._add_lists("passages", result, ("ids",), [shard_reader.plain_array(result["hash"])])
        else:
            at = self._add_passages(result) if form == "finetune" else None
            self._add_groups(result, at)

    def _add_lists(self, table: str, result: dict[str, Any], names: tuple[str, ...], more: list[pa.Array]) -> None:
        types = [field.type for field in self.writers[table].schema]
        lists = [
            shard_reader.list_array(result[n], result["lengths"], t.value_type) for n, t in zip(names, types, strict=False)
        ]
        self.writers[table].write([*lists, *more])
        self._count(result["ids"])

    def _add_passages(self, result: dict[str, Any]) -> np.ndarray:
        """Writes the passages that are new to the segment; returns the row of each that the block names."""
        new = np.array([key not in self.rows for key in result["keys"]])
        for key in result["keys"]:
            self.rows.setdefault(key, len(self.rows))
        assert not (new & ~result["sent"]).any(), "a worker left out a passage that no earlier block holds"
        keep = new[result["sent"]]
        kept = {"ids": result["ids"][np.repeat(keep, result["lengths"])], "lengths": result["lengths"][keep]}
        if keep.any():
            self._add_lists("passages", kept, ("ids",), [shard_reader.plain_array(result["hash"][keep])])
        self.cut += int(result["passage_cuts"][keep].sum())
        return np.array([self.rows[key] for key in result["keys"]], dtype=np.int64)

    def _add_groups(self, result: dict[str, Any], at: np.ndarray | None) -> None:
        query, lengths = result["query"]
        groups = self.writers["groups"].schema
        columns: list[pa.Array] = [shard_reader.list_array(query, lengths, groups.field("query").type.value_type)]
        for refs in result["columns"][:2]:
            counts = np.fromiter(map(len, refs), dtype=np.int64, count=len(refs))
            flat = np.fromiter(itertools.chain.from_iterable(refs), dtype=np.int64, count=int(counts.sum()))
            columns.append(shard_reader.list_array(flat if at is None else at[flat], counts, pa.int64()))
            self.named += len(flat)
        self.alone += sum(not len(refs) for refs in result["columns"][1])
        for values, kind in zip(result["columns"][2:], groups.types[3:], strict=True):
            given = any(value is not None for value in values)
            columns.append(pa.array(values, kind) if given else pa.nulls(len(values), kind))
        self.writers["groups"].write(columns)
        self._count(query)

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
        record = {"files": files, "rows": self.good, "lines": self.lines, "skipped": len(self.skipped), "first": self.first}
        record |= {"tokens": self.tokens, "unknown_tokens": self.unknown, "cut_texts": self.cut}
        if self.settings.form == "finetune":
            # One passage in all of the input would leave nothing to compare: its hash tells, segment by segment.
            only = next(iter(self.rows)).hex() if len(self.rows) == 1 else None
            record |= {"passages": len(self.rows), "only_passage": only}
        if self.settings.form in ("finetune", "by_id"):
            record |= {"named": self.named, "alone": self.alone}
        # The shards are on the disk by now; a record that a power cut empties is one segment to make again.
        write_whole(self.folder / JOURNAL / f"{name}.json", orjson.dumps(record), sync=False)

    def abort(self) -> None:
        """Closes the open files of a failed run."""
        for writer in self.writers.values():
            writer.abort()


def stage_of(settings: Settings) -> str:
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
        files = orjson.loads(path.read_bytes())["files"]
        return all((folder / entry["file"]).stat().st_size == entry["bytes"] for entry in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def end_source(folder: Path, stage: str, source: int, segments: int) -> None:
    """Notes how many segments a source has."""
    write_whole(folder / JOURNAL / f"{stage}-{source:05d}.json", orjson.dumps({"segments": segments}), sync=False)


def count_segments(folder: Path, stage: str, source: int) -> int | None:
    """How many segments a source has, None where its end was not reached yet."""
    path = folder / JOURNAL / f"{stage}-{source:05d}.json"
    try:
        return orjson.loads(path.read_bytes())["segments"]
    except (OSError, ValueError):
        return None


def read_record(folder: Path, stage: str, source: int, segment: int) -> dict[str, Any]:
    """The record of a finished segment."""
    return orjson.loads((folder / JOURNAL / f"{stage}-{source:05d}-{segment:06d}.json").read_bytes())


def read_skipped(folder: Path, stage: str, source: int, segment: int) -> Iterator[dict[str, Any]]:
    """The skipped lines of a finished segment, as {"line": its number in the segment from 0, "reason"}."""
    path = folder / JOURNAL / f"{stage}-{source:05d}-{segment:06d}.skipped.jsonl"
    with open(path, "rb") as file:
        yield from map(orjson.loads, file)
