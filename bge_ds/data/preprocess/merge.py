"""From records of segments to one manifest: how a run ends, and how the parts of several runs become one folder.

Both are the same: the records of all segments are read in the order of the input and added up. So a folder merged of
parts is, byte for byte, the one that a single run would have made, and no shard is read or copied for it: the merged
folder holds hard links to the parts' files, which stay valid when the parts are removed, and which `cp -r` copies.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec
import orjson

from bge_ds.data.files import link_or_copy
from bge_ds.data.preprocess import output_folder, segment_writer
from bge_ds.data.shards.manifest_file import (
    PART,
    SKIPPED,
    TABLES,
    Manifest,
    Part,
    PartSource,
    ShardEntry,
    SourceEntry,
    read_manifest,
    read_part,
    write_manifest,
)

SUMMED = ("tokens", "unknown_tokens", "cut_texts", "cut_tokens")


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


# --------------------------------------------------------------------------------------------------------- assembling


def assemble(folder: Path, parts: list[Path], part: Part) -> Manifest:
    """Writes the list of skipped lines and the manifest of `folder` from the records in `parts`. Returns the manifest.

    Raises ValueError where nothing can be trained on, or, with on_error "raise", for a source without a line."""
    header, kind, listed = msgspec.to_builtins(part.header), part.header.kind, folder / f".{SKIPPED}"
    try:
        with open(listed, "wb") as skip_file:
            total = _Totals(parts, part, skip_file)
            if part.corpus:
                header["corpus"] = total.add_stage("corpus", part.corpus)
            sources = total.add_stage("rows", part.sources)
        try:
            counts = total.counts(kind, sources[-1].rows[1])
        except ValueError:
            shutil.rmtree(folder / output_folder.JOURNAL, ignore_errors=True)  # cannot continue: the input must change
            raise
        if total.skipped:
            os.replace(listed, folder / SKIPPED)
    finally:
        listed.unlink(missing_ok=True)
    # Stable: within a table the input's order stays.
    files = sorted(total.files, key=lambda pair: TABLES[kind].index(pair[0].table))
    for entry, owner in files:
        if not (owner / entry.file).is_file():
            raise ValueError(f"{owner / entry.file} is missing: copy this part again, or make it again")
        if owner != folder:
            link_or_copy(owner / entry.file, folder / entry.file)
    shards = [entry for entry, _ in files]
    return write_manifest(folder, {**header, "counts": counts, "sources": sources, "shards": shards})


class _Totals:
    """Adds up records in the order of the input."""

    def __init__(self, parts: list[Path], part: Part, skip_file: BinaryIO) -> None:
        self.parts, self.part, self.skip_file = parts, part, skip_file
        self.files: list[tuple[ShardEntry, Path]] = []  # each with the folder that it is in
        self.sums: Counter[str] = Counter()
        self.only: set[str | None] = set()  # the only passage of each segment with rows
        self.skipped, self.place, self.first_skipped = 0, "", ""  # place: of the first row

    def add_stage(self, stage: str, sources: list[PartSource]) -> list[SourceEntry]:
        """The manifest's entries of a stage's sources."""
        found, row = [], 0
        for number, source in enumerate(sources):
            start, lines, skipped = row, 0, 0
            for segment in range(source.segments):
                owner = self.parts[(number + segment) % len(self.parts)]
                try:
                    record = segment_writer.read_record(owner, stage, number, segment)
                except FileNotFoundError:
                    raise ValueError(
                        f"{owner} lacks segment {segment} of {source.path}: copy the part again, or make it again"
                    ) from None
                self.files += [(entry, owner) for entry in record.files]
                self.sums.update(record.counts)
                at = lines + source.first_number
                for line, reason in record.skipped:
                    self._skip(source.path, at + line, reason)
                if stage == "rows" and record.rows:
                    self.place = self.place or f"{source.path}:{at + (record.first or 0)}"
                    self.only.add(record.only_passage)
                row, lines, skipped = row + record.rows, lines + record.lines, skipped + len(record.skipped)
            if row == start and not skipped:
                if self.part.on_error == "raise" or stage == "corpus":
                    raise ValueError(f"{source.path}: the file is empty: it holds no line")
                self._skip(source.path, 0, "the file is empty")
                skipped = 1
            found.append(SourceEntry(path=source.path, rows=(start, row), lines=lines, skipped=skipped))
        return found

    def _skip(self, path: str, line: int, reason: str) -> None:
        self.skip_file.write(orjson.dumps({"file": path, "line": line, "reason": reason}, option=orjson.OPT_APPEND_NEWLINE))
        self.first_skipped = self.first_skipped or f"{path}:{line}: {reason}"
        self.skipped += 1

    def counts(self, kind: str, rows: int) -> dict[str, int]:
        """The manifest's counts. Raises ValueError where no row can be trained on."""
        if not rows:
            raise ValueError(f"no line is good: {self.skipped} skipped, the first is {self.first_skipped}")
        if kind == "pretrain":
            counts = {"texts": rows}
        else:
            passages, named, alone = (self.sums[name] for name in ("passages", "named", "alone"))
            # A corpus may hold passages that no group names, and says nothing of which are named.
            one = passages == 1 or (not self.part.corpus and len(self.only) == 1 and None not in self.only)
            if alone == rows and (rows == 1 or one):
                raise ValueError(
                    f'{self.place}: nothing to compare against: no line has a "neg" text, and no other line has another'
                    " positive, which could serve as one: add negatives or more lines"
                )
            counts = {"groups": rows, "passages": passages}
            if not self.part.corpus:
                counts["duplicates"] = named - passages
            counts["groups_without_negatives"] = alone
        return counts | {name: self.sums[name] for name in SUMMED} | {"skipped": self.skipped}


def finish(folder: Path) -> Manifest:
    """Removes from a folder with a manifest what was needed to write it. Returns the manifest."""
    (folder / PART).unlink(missing_ok=True)
    shutil.rmtree(folder / output_folder.JOURNAL, ignore_errors=True)
    return read_manifest(folder)
