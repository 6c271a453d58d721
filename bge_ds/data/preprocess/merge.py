"""From records of segments to one manifest: how a run ends, and how the parts of several runs become one folder.

Both are the same: the records of all segments are read in the order of the input and added up. So a folder merged of
parts is, byte for byte, the one that a single run would have made, and no shard is read or copied for it: the merged
folder holds hard links to the parts' files, which stay valid when the parts are removed, and which `cp -r` copies.
"""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson

from bge_ds.data.preprocess import output_folder, segment_writer
from bge_ds.data.preprocess.rows import SegmentRecord
from bge_ds.data.shards import manifest_file
from bge_ds.data.shards.manifest_file import (
    Manifest,
    Part,
    PartSource,
    ShardEntry,
    SourceEntry,
    read_manifest,
    read_part,
    write_manifest,
)

SUMMED = ("tokens", "unknown_tokens", "cut_texts")


def merge(parts: list[Path], output: Path, overwrite: bool = False, say: Callable[[str], None] = print) -> Manifest:
    """Joins all parts of a partitioned run into the folder `output`. Returns the manifest.

    Raises ValueError for a part that is missing, given twice, of another run or unfinished."""
    read = {folder: read_part(folder) for folder in parts}
    first = read[parts[0]]
    owners: dict[int, Path] = {}
    for folder, part in read.items():
        for name, what in (("plan", "inputs or settings"), ("of", "number of parts")):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"{folder} is of another run than {parts[0]}: other {what}: merge the parts of one run")
        if part.part in owners:
            raise ValueError(f"{folder} is part {part.part}/{part.of}, and so is {owners[part.part]}: name each once")
        owners[part.part] = folder
    if len(read) < len(parts):
        twice = next(folder for folder in parts if parts.count(folder) > 1)
        raise ValueError(f"{twice} is given twice: name each part once")
    if missing := sorted(set(range(1, first.of + 1)) - owners.keys()):
        raise ValueError(f"part {missing[0]}/{first.of} is missing: preprocess it (--partition {missing[0]}/{first.of})")
    with output_folder.new_folder(output, overwrite, job=f"merge{first.plan}", say=say) as folder:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return assemble(folder, [owners[i] for i in sorted(owners)], first)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copy2(path, target)  # another disk, or one without hard links


# --------------------------------------------------------------------------------------------------------- assembling


def assemble(folder: Path, parts: list[Path], part: Part) -> Manifest:
    """Writes the list of skipped lines and the manifest of `folder` from the records in `parts`. Returns the manifest.

    Raises ValueError where nothing can be trained on, or, with on_error "raise", for a source without a line."""
    total = _Totals(folder, parts, part)
    header = msgspec.to_builtins(part.header)
    if part.corpus:
        header["corpus"] = total.read_stage("corpus", part.corpus)
    try:
        with open(folder / f".{manifest_file.SKIPPED}", "wb") as total.skip_file:
            found = total.read_stage("rows", part.sources)
        try:
            counts = total.counts(part.header.kind)
        except ValueError:
            shutil.rmtree(folder / output_folder.JOURNAL, ignore_errors=True)  # no way to go on: the input must change
            raise
        if total.skipped:
            os.replace(folder / f".{manifest_file.SKIPPED}", folder / manifest_file.SKIPPED)
    finally:
        (folder / f".{manifest_file.SKIPPED}").unlink(missing_ok=True)
    tables = manifest_file.TABLES[part.header.kind]
    total.files.sort(key=lambda entry: tables.index(entry.table))  # stable: within a table the input's order stays
    for entry in total.files:
        owner = total.owners[entry.file]
        if not (owner / entry.file).is_file():
            raise ValueError(f"{owner / entry.file} is missing: copy this part again, or make it again")
        if owner != folder:
            _link(owner / entry.file, folder / entry.file)
    return write_manifest(folder, {**header, "counts": counts, "sources": found, "shards": total.files})


class _Totals:
    """Adds up records in the order of the input."""

    def __init__(self, folder: Path, parts: list[Path], part: Part) -> None:
        self.folder, self.parts, self.part = folder, parts, part
        self.files: list[ShardEntry] = []
        self.owners: dict[str, Path] = {}  # file -> the folder that it is in
        self.sums = dict.fromkeys(("passages", "named", "alone", "rows", *SUMMED), 0)
        self.only: set[str | None] = set()  # the one passage of each segment that has but one; None: a segment has more
        self.skipped, self.place, self.first_skipped = 0, "", ""
        self.skip_file: Any = None

    def read_stage(self, stage: str, sources: list[PartSource]) -> list[SourceEntry]:
        """The manifest's entries of a stage's sources."""
        found, row = [], 0
        for number, source in enumerate(sources):
            start, lines, skipped = row, 0, 0
            for segment, record in self._records(stage, number, source):
                at = lines + source.first_number
                self.files += record.files
                self.owners |= {entry.file: self._owner(number, segment) for entry in record.files}
                for name in SUMMED:
                    self.sums[name] += getattr(record, name)
                if stage == "rows":
                    self._add(record, f"{source.path}:{at + (record.first or 0)}")
                    if record.skipped:
                        self._list_skipped(number, segment, source.path, at)
                else:
                    self.sums["passages"] += record.rows
                row, lines, skipped = row + record.rows, lines + record.lines, skipped + record.skipped
            if row == start and not skipped:
                self._refuse_empty(source.path, stage)
                skipped = 1
            found.append(SourceEntry(path=source.path, rows=(start, row), lines=lines, skipped=skipped))
        return found

    def _owner(self, number: int, segment: int) -> Path:
        return self.parts[(number + segment) % len(self.parts)]

    def _records(self, stage: str, number: int, source: PartSource) -> Iterator[tuple[int, SegmentRecord]]:
        for segment in range(source.segments):
            owner = self._owner(number, segment)
            try:
                yield segment, segment_writer.read_record(owner, stage, number, segment)
            except FileNotFoundError:
                raise ValueError(
                    f"{owner} lacks segment {segment} of {source.path}: copy the part again, or make it again"
                ) from None

    def _add(self, record: SegmentRecord, place: str) -> None:
        for name in ("rows", "passages", "named", "alone"):
            self.sums[name] += getattr(record, name) or 0
        if record.rows:
            self.place = self.place or place
            self.only.add(record.only_passage or None)

    def _list_skipped(self, number: int, segment: int, path: str, at: int) -> None:
        owner = self._owner(number, segment)
        for line in segment_writer.read_skipped(owner, "rows", number, segment):
            self._skip({"file": path, "line": at + line.line, "reason": line.reason})

    def _skip(self, line: dict[str, Any]) -> None:
        self.skip_file.write(orjson.dumps(line) + b"\n")
        self.first_skipped = self.first_skipped or f"{line['file']}:{line['line']}: {line['reason']}"
        self.skipped += 1

    def _refuse_empty(self, path: str, stage: str) -> None:
        if self.part.on_error == "raise" or stage == "corpus":
            raise ValueError(f"{path}: the file is empty: it holds no line")
        self._skip({"file": path, "line": 0, "reason": "the file is empty"})

    def counts(self, kind: str) -> dict[str, int]:
        """The manifest's counts. Raises ValueError where no row can be trained on."""
        total = self.sums["rows"]
        if not total:
            raise ValueError(f"no line is good: {self.skipped} skipped, the first is {self.first_skipped}")
        if kind == "pretrain":
            counts = {"texts": total}
        else:
            passages, named = self.sums["passages"], self.sums["named"]
            # A corpus may hold passages that no group names, and says nothing of which are named.
            one = passages == 1 or (not self.part.corpus and len(self.only) == 1 and None not in self.only)
            if self.sums["alone"] == total and (total == 1 or one):
                raise ValueError(
                    f'{self.place}: nothing to compare against: no line has a "neg" text, and no other line has another'
                    " positive, which could serve as one: add negatives or more lines"
                )
            counts = {"groups": total, "passages": passages}
            if not self.part.corpus:
                counts["duplicates"] = named - passages
            counts["groups_without_negatives"] = self.sums["alone"]
        return counts | {name: self.sums[name] for name in SUMMED} | {"skipped": self.skipped}


def finish(folder: Path) -> Manifest:
    """Removes from a folder with a manifest what was needed to write it. Returns the manifest."""
    (folder / manifest_file.PART).unlink(missing_ok=True)
    shutil.rmtree(folder / output_folder.JOURNAL, ignore_errors=True)
    return read_manifest(folder)


def shown_skipped(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first skipped lines of a folder."""
    path = folder / manifest_file.SKIPPED
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [orjson.loads(line) for line in itertools.islice(file, count)]
