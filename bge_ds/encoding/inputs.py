"""What is encoded: texts of files, or the token ids of shards, each read from the first text of any block on.

Texts are checked and counted once, before a model is loaded; that pass notes where each block begins. Shards hold token ids
already, and their rows are reached by arithmetic.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bge_ds.data.preprocess import input_files, table_files, validate
from bge_ds.data.preprocess.input_files import LineReader, Source
from bge_ds.data.preprocess.tokenize import TokenizerCore
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.shards.manifest_file import MANIFEST, Manifest, SourceEntry, read_manifest
from bge_ds.data.shards.shard_reader import FinetuneShards, PretrainShards, open_folders
from bge_ds.encoding.manifest import InputEntry, Start

FIELDS = validate.KEYS["texts"]


def open_input(paths: list[str], columns: list[str], allow_empty: bool, side: str) -> TextInput | ShardInput:
    """The input of `--input`. Raises ValueError for paths that do not exist, and for shards among other files."""
    shards = [path for path in paths if (Path(path) / MANIFEST).is_file()]
    if not shards:
        return TextInput(paths, columns_of(columns), allow_empty)
    if others := [path for path in paths if path not in shards]:
        raise ValueError(f"--input: {shards[0]} is a folder of shards and {others[0]} is not: encode them one after the other")
    if given := [name for name, value in (("columns", columns), ("allow_empty", allow_empty)) if value]:
        raise ValueError(f"--{given[0]} has no effect on shards, whose texts are token ids: drop it")
    return ShardInput(shards, side)


def columns_of(given: list[str], fields: tuple[str, ...] = FIELDS) -> tuple[tuple[str, str], ...]:
    """`--columns text=contents` as pairs."""
    pairs = []
    for text in given:
        field, _, column = text.partition("=")
        if field not in fields or not column or field in dict(pairs):
            raise ValueError(f"--columns {text}: give FIELD=COLUMN, FIELD one of {', '.join(fields)}, each once")
        pairs.append((field, column))
    return tuple(pairs)


class TextInput:
    """The texts of files of JSON lines, of tables and of hub data sets: `text`, with `title` before it, and maybe `_id`."""

    def __init__(self, paths: list[str], columns: tuple[tuple[str, str], ...] = (), allow_empty: bool = False) -> None:
        self.sources = input_files.find_sources(paths)
        self.columns, self.allow_empty = columns, allow_empty
        self._wanted = tuple(dict(columns).get(name, name) for name in FIELDS)
        self._scanned: InputEntry | None = None
        self._opened: tuple[int, LineReader | table_files.InputTable] | None = None  # the source that was read last

    def identity(self) -> list[Any]:
        return [[source.identity() for source in self.sources], [list(pair) for pair in self.columns]]

    def scan(self, block_texts: int) -> InputEntry:
        """Reads and checks all texts. Raises ValueError for the first bad line, with its file and number."""
        if self._scanned is not None and self._block_texts == block_texts:
            return self._scanned
        digest, starts, rows, empty, has_ids = xxhash.xxh3_128(), [], [0] * len(self.sources), 0, False
        for number, (start, identity, text) in enumerate(self._texts(Start(0, 0, 0))):
            if number == 0:
                has_ids = identity is not None
            elif has_ids != (identity is not None):
                raise ValueError(
                    f"{self._place(start)}: a line {'without' if has_ids else 'with'} an _id after others "
                    f"{'with' if has_ids else 'without'} one: give each line one, or none"
                )
            if number % block_texts == 0:
                starts.append(start)
            rows[start.source] += 1
            empty += not text.strip()
            # 0xff is in no UTF-8 text.
            digest.update((identity or "").encode() + b"\xff" + text.encode() + b"\xff")
        if 0 in rows:
            raise ValueError(f"{self.sources[rows.index(0)].name}: it holds no text")
        self._block_texts, self._scanned = block_texts, InputEntry(
            fingerprint=digest.hexdigest(), identity=self.identity(), texts=sum(rows), empty=empty, has_ids=has_ids,
            starts=starts, sources=_entries([source.name for source in self.sources], rows),
        )  # fmt: skip
        return self._scanned

    def texts(self, start: Start, count: int) -> Iterator[tuple[str | None, str]]:
        """(_id, text) of `count` texts from one on."""
        return ((identity, text) for _, identity, text in islice(self._texts(start), count))

    def _texts(self, start: Start) -> Iterator[tuple[Start, str | None, str]]:
        for index in range(start.source, len(self.sources)):
            for place, line in self._lines(start if index == start.source else Start(index, 0, 0)):
                try:
                    if isinstance(line, Exception):
                        raise line
                    identity, text = self._read(line)
                except ValueError as error:
                    raise ValueError(f"{self._place(place)}: {error}") from None
                yield place, identity, text

    def _read(self, line: bytes | dict[str, Any]) -> tuple[str | None, str]:
        """(_id, text) of a line, or of a row of a table. Raises ValueError for what is wrong with it."""
        read = validate.parse_line if isinstance(line, bytes) else validate.check
        record = read(line, "texts", self.columns)
        if not self.allow_empty and not record["text"].strip():
            raise ValueError('"text" is an empty text: give it one, or --allow_empty')
        return record.get("_id"), record["text"]

    def _lines(self, start: Start) -> Iterator[tuple[Start, Any]]:
        """(where it stands, a line that is not blank, or a row) of one source from `start` on."""
        source, line = self.sources[start.source], start.line
        opened = self._open(start.source, source)
        if isinstance(opened, LineReader):
            for offset, raw in opened.read(start.at):
                if raw.strip():
                    yield Start(start.source, offset, line), raw
                line += 1
            return
        for count, data in opened.read(start.at, opened.rows, input_files.BLOCK_BYTES):
            for row, record in enumerate(table_files.from_bytes(data), line):
                yield Start(start.source, row, row), record
            line += count

    def _open(self, index: int, source: Source) -> LineReader | table_files.InputTable:
        """The source's reader: one that is kept reads a compressed file once, though its blocks are asked for one by one."""
        if self._opened is None or self._opened[0] != index:
            table = source.is_table
            opened = table_files.InputTable(source.path, source.is_dataset, self._wanted) if table else None
            self._opened = index, opened or LineReader(source, self._wanted)
        return self._opened[1]

    def _place(self, start: Start) -> str:
        source = self.sources[start.source]
        return f"{source.name}:{start.line + source.first_number}"


class ShardInput:
    """The texts of shards as token ids: of pretrain shards all, of finetune ones the passages or the queries of the groups."""

    def __init__(self, folders: list[str], side: str, rows: np.ndarray | None = None) -> None:
        """rows: of the texts that are wanted, int64, rising; None: all."""
        self.folders, self.side, self.rows = folders, side, rows
        self.manifests = [read_manifest(Path(folder)) for folder in folders]
        self.shards = open_folders(folders)
        pretrain = isinstance(self.shards, PretrainShards)
        self.table = "texts" if pretrain else "passages" if side == "passage" else "groups"
        self._length, self._instruction = "max_seq_length", ""
        if not pretrain:
            self._length, self._instruction = f"{side}_max_len", f"{side}_instruction_for_retrieval"

    def identity(self) -> list[Any]:
        wanted = [] if self.rows is None else [xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.rows))]
        return [self.table, [manifest.fingerprint for manifest in self.manifests], *wanted]

    def scan(self, block_texts: int) -> InputEntry:
        """What there is. Shards were checked when they were made."""
        rows = [sum(shard.rows for shard in made.shards if shard.table == self.table) for made in self.manifests]
        if not sum(rows):
            raise ValueError(f"{self.folders[0]} holds no {self.table}")
        if self.rows is not None:
            rows = np.diff(np.searchsorted(self.rows, np.cumsum(rows)), prepend=0).tolist()
        return InputEntry(
            fingerprint=xxhash.xxh3_128_hexdigest(repr(self.identity()).encode()), identity=self.identity(),
            texts=sum(rows), sources=_entries(self.folders, rows),
        )  # fmt: skip

    def max_len(self, given: int | None, default: int) -> int:
        """The length in effect. Raises ValueError for one that is longer than what the shards were cut to."""
        longest = min(getattr(manifest, self._length) or 0 for manifest in self.manifests)
        if given is not None and given > longest:
            raise ValueError(
                f"a length of {given} is more than the {longest} tokens that {', '.join(self.folders)} was cut to: give "
                f"{longest} or less, or preprocess again with --{self._length} {given}"
            )
        return given or min(default, longest)

    def check(self, core: TokenizerCore, prompt: str) -> None:
        """Raises ValueError where the shards are of another tokenizer than the model's, or hold another prompt."""
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            made = manifest.tokenizer
            if made.fingerprint != core.fingerprint:
                raise ValueError(
                    f"{folder} was made with another tokenizer, {made.name}, than the model's, {core.name}: preprocess again "
                    f"with --tokenizer {core.name}"
                )
            if self.table == "passages" and manifest.passages_by_type:
                raise ValueError(
                    f"{folder} holds passages that begin as their query does (made with --passages_by_type): encode the texts "
                    "themselves"
                )
            if (held := self._held_prompt(manifest)) != prompt:
                raise ValueError(
                    f"{folder} holds the {self.side} prompt {held!r}, and {prompt!r} is in effect: give "
                    f"--{self.side}_instruction_for_retrieval {shlex.quote(held)}, or give the texts themselves"
                )
        self.suffix = len(core.suffix_ids)

    def _held_prompt(self, manifest: Manifest) -> str:
        return (getattr(manifest, self._instruction) or "") if self._instruction else ""

    def ids(self, rows: range, max_len: int) -> RaggedArrays:
        """Token ids of texts, special tokens included, cut to `max_len`; `check` was called before."""
        rows_K = np.arange(rows.start, rows.stop) if self.rows is None else np.array(self.rows[rows.start : rows.stop])
        if isinstance(self.shards, PretrainShards):
            found = self.shards.texts(rows_K)[0]
        else:
            assert isinstance(self.shards, FinetuneShards)
            found = self.shards.passages(rows_K) if self.table == "passages" else self.shards.queries(rows_K)
        return found.cut(max_len, self.suffix)


def _entries(names: list[str], rows: list[int]) -> list[SourceEntry]:
    ends = np.cumsum(rows).tolist()
    return [SourceEntry(path=name, rows=(end - n, end)) for name, n, end in zip(names, rows, ends, strict=True)]
