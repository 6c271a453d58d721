"""What a folder of vectors says of itself: typed, checked when read.

    job.json            while the work is in progress: what is encoded, and how
    blocks/000000.json  a finished block
    manifest.json       at the end, in place of both: a folder with a manifest is whole

The manifest's fingerprint is a hash of all that decides the vectors and of the hashes of their files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import orjson
import xxhash

from bge_ds.data.files import write_whole
from bge_ds.data.shards.manifest_file import MANIFEST, VECTORS, SourceEntry

SCHEMA_VERSION = 1
JOB, BLOCKS = "job.json", "blocks"

Count = Annotated[int, msgspec.Meta(ge=0)]
DType = Literal["float32", "float16", "bfloat16", "int8"]
Made = TypeVar("Made", bound=msgspec.Struct)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides a text's vector, up to rounding. model: its name, which decides nothing. model_hash: of its files."""

    model: str
    model_hash: str
    side: Literal["query", "passage"]
    prompt: str
    max_len: Count  # tokens, prompt and special tokens included
    pooling: str
    normalize: bool
    bf16: bool
    dim: Count  # features of each vector: the model's, or the first of them (Matryoshka)
    dtype: DType


class Start(NamedTuple):
    """Where a text stands in the input: number of the source, offset of its line (unpacked bytes) or row, lines before it."""

    source: int
    at: int
    line: int


class InputEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The texts. fingerprint: a hash of all texts and ids in order. identity: names, sizes and times of the files."""

    fingerprint: str
    identity: list[Any]
    sources: list[SourceEntry]
    texts: Count
    empty: Count = 0  # texts without a character that is not white space
    has_ids: bool = False
    starts: list[Start] = []  # of the blocks; none where rows are reached by arithmetic


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is encoded, and how. Block k has the vectors of texts [k * block_texts, (k + 1) * block_texts)."""

    kind: Literal["vectors"] = VECTORS
    schema_version: int = SCHEMA_VERSION
    bge_ds_version: str
    settings: Settings
    input: InputEntry
    block_texts: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def num_blocks(self) -> int:
        return -(-self.input.texts // self.block_texts)

    def rows(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.block_texts, min((block + 1) * self.block_texts, self.input.texts))


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a block. hash: xxh3_128 of its bytes."""

    file: str
    bytes: Count
    hash: str


class BlockEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A finished block. files: `vectors-*.npy`, then `ids-*.arrow` and `scales-*.npy` where there are such."""

    texts: Count
    tokens: Count
    files: list[FileEntry]


class Manifest(Job, frozen=True, kw_only=True):
    """A job that is done. counts: `texts`, `tokens`, `empty`."""

    counts: dict[str, Count]
    blocks: list[BlockEntry]
    fingerprint: str = ""


def make_manifest(job: Job, blocks: list[BlockEntry]) -> Manifest:
    counts = {"texts": job.input.texts, "tokens": sum(block.tokens for block in blocks), "empty": job.input.empty}
    made = Manifest(**msgspec.structs.asdict(job), counts=counts, blocks=blocks)
    return msgspec.structs.replace(made, fingerprint=fingerprint(made))


def fingerprint(manifest: Manifest) -> str:
    """A hash of all that decides the vectors and of their files: names of models, inputs and versions are left out."""
    settings = msgspec.to_builtins(manifest.settings) | {"model": None}
    blocks = [[block.texts, block.tokens, [msgspec.to_builtins(file) for file in block.files]] for block in manifest.blocks]
    content = [settings, manifest.input.fingerprint, manifest.input.texts, manifest.block_texts, blocks]
    return xxhash.xxh3_128_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of vectors. Raises ValueError, which names the file and the field."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        unfinished = (Path(folder) / JOB).is_file()
        raise ValueError(
            f"{folder} is unfinished: run the same command again to continue" if unfinished else
            f"{folder} is not a folder of vectors: it has no {MANIFEST}; make one with python -m bge_ds.encode"
        )  # fmt: skip
    manifest = read(path, Manifest)
    if fingerprint(manifest) != manifest.fingerprint or len(manifest.blocks) != manifest.num_blocks:
        raise ValueError(f"{path}: its fingerprint is not that of its content: it was edited or damaged: {_REMEDY}")
    return manifest


_REMEDY = "copy the folder again, or encode again with --overwrite"


def read(path: Path, kind: type[Made]) -> Made:
    """A typed JSON file. Raises ValueError, which names the file and the field."""
    try:
        content = orjson.loads(path.read_bytes())
        if isinstance(content, dict) and kind is not BlockEntry and content.get("kind") != VECTORS:
            raise ValueError(f"{path} is not that of vectors: name another folder")
        if kind is not BlockEntry and content.get("schema_version") != SCHEMA_VERSION:
            version = content.get("schema_version")
            raise ValueError(f"{path}: schema version {version}; this bge_ds reads {SCHEMA_VERSION}: encode again")
        return msgspec.convert(content, kind)
    except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}: {_REMEDY}") from None


def write(path: Path, content: msgspec.Struct, writer: str = "") -> None:
    made = orjson.dumps(msgspec.to_builtins(content), option=orjson.OPT_INDENT_2) + b"\n"
    write_whole(path, made, writer=writer)
