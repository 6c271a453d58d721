"""The manifest of a folder of shards, and what a part of a partitioned run says of itself: typed, checked when read.

The manifest is written last, into a folder that gets its final name by one rename: a folder with a manifest is whole.
Its fingerprint is a hash of everything that decides what a row holds, so an edited value is noticed when it is read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import orjson
import xxhash

from bge_ds.data.files import write_whole

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
PART = "part.json"  # in place of the manifest, in a part that waits to be merged
VECTORS = "vectors"  # the kind of the manifest that `bge_ds.encode` writes
TABLES = {"pretrain": ("texts",), "finetune": ("passages", "groups")}

Count = Annotated[int, msgspec.Meta(ge=0)]
Made = TypeVar("Made")


class TokenizerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer that made the ids."""

    name: str
    fingerprint: str
    vocab_size: Count
    prefix_ids: list[int] = []
    suffix_ids: list[int] = []


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One Arrow file: rows of a table from one segment of one source. bytes, hash (xxh3_128): of the whole file."""

    table: str
    file: str
    source: Count
    segment: Count
    rows: Count
    bytes: Count
    hash: str


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input file: the rows [first, end) that came of it. lines, skipped: of the file, where they were counted."""

    path: str
    rows: tuple[Count, Count]
    lines: Count | None = None
    skipped: Count | None = None
    folder: int = 0  # which of several folders that are read as one


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run is told; the lengths and instructions of the other kind are None.

    An instruction is all that stands before each text."""

    kind: str
    bge_ds_version: str = ""
    tokenizer: TokenizerEntry
    max_seq_length: Count | None = None
    query_max_len: Count | None = None
    passage_max_len: Count | None = None
    query_instruction_for_retrieval: str | None = None
    passage_instruction_for_retrieval: str | None = None
    query_instruction_format: str = "{}{}"  # by which a line's own prompt was joined with its query
    passages_by_type: bool = False  # passages of lines of symmetric types begin as their query does
    word_segmenter: str | None = None
    sample: Count | None = None  # lines of each input, of a quick look


class Manifest(Header, frozen=True, kw_only=True, omit_defaults=True):
    """What a folder of shards holds."""

    schema_version: int
    corpus: list[SourceEntry] | None = None
    counts: dict[str, Count]
    sources: list[SourceEntry]
    shards: list[ShardEntry]
    fingerprint: str


class PartSource(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a partitioned run. first_number: of its first line or row."""

    path: str
    first_number: Count
    segments: Count


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a part is of. plan: a hash that the parts of one run share."""

    schema_version: int
    part: int
    of: int
    plan: str
    on_error: str
    header: Header
    sources: list[PartSource]
    corpus: list[PartSource]


def fingerprint(manifest: Manifest | dict[str, Any]) -> str:
    """A hash over all in a manifest that decides what a row holds: folders of one fingerprint train alike."""
    # Left out: the version and all names, which may change while every row stays the same.
    content = {k: v for k, v in msgspec.to_builtins(manifest).items() if k not in ("fingerprint", "bge_ds_version")}
    content["tokenizer"] = content["tokenizer"] | {"name": None}
    for key in {"sources", "corpus"} & content.keys():
        content[key] = [source["rows"] for source in content[key]]
    return xxhash.xxh3_128_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def read_manifest(folder: Path, check: bool = True) -> Manifest:
    """The manifest of a folder of shards. check: refuse one whose content is not that of its fingerprint.

    Raises ValueError, which names the file and the field, where there is none or this version cannot read it."""
    path = Path(folder) / MANIFEST
    if not path.is_file() and (Path(folder) / PART).is_file():
        raise ValueError(f"{folder} is one part of several: join them first (python -m bge_ds.preprocess merge)")
    if not path.is_file():
        raise ValueError(f"{folder} is not a folder of shards: it has no {MANIFEST}; run python -m bge_ds.preprocess")
    content = _read_json(path)
    manifest = _as_typed(content, Manifest, path)
    if manifest.kind not in TABLES:
        raise ValueError(f"{path}: kind {manifest.kind!r} is none of {', '.join(TABLES)}: {_REMEDY}")
    if check and fingerprint(content) != manifest.fingerprint:
        raise ValueError(f"{path}: its fingerprint is not that of its content: it was edited or damaged: {_REMEDY}")
    return manifest


def join_manifests(manifests: list[Manifest]) -> Manifest:
    """One manifest for folders that are read as one; each source has its rows shifted and the `folder` (a number) it is of.

    Lengths are the smallest. An instruction that differs between the folders is None. The fingerprint is one of all."""
    first, row = manifests[0], 0
    if len(manifests) == 1:
        return first
    changed: dict[str, Any] = {
        "fingerprint": xxhash.xxh3_128_hexdigest("\0".join(one.fingerprint for one in manifests).encode())
    }
    for name in ("max_seq_length", "query_max_len", "passage_max_len"):
        changed[name] = min((getattr(one, name) for one in manifests), key=lambda length: length or 0)
    for name in ("query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
        values = {getattr(one, name) for one in manifests}
        changed[name] = values.pop() if len(values) == 1 else None
    sources, shards, counts = [], [], Counter()
    for k, one in enumerate(manifests):
        for source in one.sources:
            rows = (row + source.rows[0], row + source.rows[1])
            sources.append(msgspec.structs.replace(source, rows=rows, folder=k))
        shards += one.shards
        counts.update(one.counts)
        row += sum(entry.rows for entry in one.shards if entry.table == TABLES[first.kind][-1])
    return msgspec.structs.replace(first, **changed, counts=dict(counts), sources=sources, shards=shards)


def write_manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    """Adds the schema version and the fingerprint, writes `manifest.json`, returns the manifest. To be called last."""
    made = msgspec.to_builtins({"schema_version": SCHEMA_VERSION, **content})
    made["fingerprint"] = fingerprint(made)
    write_whole(folder / MANIFEST, orjson.dumps(made, option=orjson.OPT_INDENT_2) + b"\n")
    return _as_typed(made, Manifest, folder / MANIFEST)


def read_part(folder: Path) -> Part:
    """What a finished part is of. Raises ValueError as `read_manifest` does."""
    path = folder / PART
    if not path.is_file():
        whole = " (it is a whole folder of shards)" if (folder / MANIFEST).is_file() else ""
        raise ValueError(f"{folder} is not a finished part: it has no {PART}{whole}; make parts with --partition i/n")
    return _as_typed(_read_json(path), Part, path)


def write_part(folder: Path, part: Part) -> None:
    """Writes what a part is of. Its segments are complete by now."""
    write_whole(folder / PART, orjson.dumps(msgspec.to_builtins(part), option=orjson.OPT_INDENT_2) + b"\n")


_REMEDY = "copy the folder again, or preprocess again"


def _read_json(path: Path) -> Any:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}): {_REMEDY}") from error
    if isinstance(content, dict) and content.get("kind") == VECTORS:
        raise ValueError(f"{path} is that of vectors that bge_ds.encode wrote, not of shards: give the folder that was encoded")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema version {version}; this bge_ds reads {SCHEMA_VERSION}: preprocess again")
    return content


def _as_typed(content: Any, kind: type[Made], path: Path) -> Made:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}: {_REMEDY}") from None
