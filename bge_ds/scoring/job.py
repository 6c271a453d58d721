"""Scoring shared by any number of ranks through files alone, and after kills, as `encoding/output.py` has it for vectors.

    scored.jsonl.parts/job.json       while the work is in progress: what is scored, and how
    scored.jsonl.parts/000000.jsonl   a finished block: a line that tells its counts and hash, then its groups
    scored.jsonl                      at the end, all groups in order
    scored.jsonl.report.json          with it: settings, input, counts, hash; an output with a report is whole

Whoever finishes the last block writes the output. A lock beside the parts guards the first and the last step alone.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import orjson
import xxhash

from bge_ds import __version__
from bge_ds.data.files import PARTIAL, hash_file, write_whole
from bge_ds.encoding import manifest as files
from bge_ds.encoding.manifest import JOB, Count
from bge_ds.encoding.output import differences, locked
from bge_ds.scoring.groups import Group, GroupInput

SCHEMA_VERSION = 1
PARTS, REPORT = ".parts", ".report.json"
Made = TypeVar("Made", bound=msgspec.Struct)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides the output, up to rounding. model: its name, which decides nothing. model_hash: of its files."""

    model: str
    model_hash: str
    teacher: Literal["classifier", "decoder", "embedder"]
    query_prompt: str
    passage_prompt: str
    prompt: str = ""  # of a decoder, after the pair
    max_len: Count = 0  # tokens of a pair; 0 for an embedder, which sees none
    query_max_len: Count
    passage_max_len: Count
    pooling: str = ""  # of an embedder
    normalize_embeddings: bool = False
    normalize: bool
    bf16: bool
    min_pos_score: float | None
    max_neg_score: float | None
    compressed: bool


class Job(files.Job, frozen=True, kw_only=True):
    """What is scored, and how. A text of the input is a group's line."""

    kind: Literal["scores"] = "scores"
    schema_version: Literal[1] = SCHEMA_VERSION
    settings: Settings


class Report(Job, frozen=True, kw_only=True):
    """A job that is done. counts: groups, pairs, tokens, and what was dropped. bytes, hash (xxh3_128): of the output."""

    counts: dict[str, Count]
    bytes: Count
    hash: str


def take_up(
    output: Path, settings: Settings, groups: GroupInput, block_texts: int, *, rank: int, world: int, overwrite: bool = False
) -> tuple[Job | Report, list[int]]:
    """(a new job for the file `output`, or that of a killed run, or the report where all is done and undamaged; the blocks of
    this rank that are left).

    Every rank calls it. The input is read and checked where it is new or has been touched; blocks of this rank that are not as
    they were written are removed. Raises ValueError for an output of another kind or job without `overwrite`.
    """
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file, such as {output}/scored.jsonl")
    parts = _parts(output)
    with locked(parts):
        held: Job | Report | None = None
        if (parts / JOB).is_file():
            held = _read(parts / JOB, Job)
        elif output.exists() and _report_path(output).is_file():
            held = _read(_report_path(output), Report)
        if held is None and output.exists() and not overwrite:
            raise ValueError(f"--output {output} exists, and bge_ds.score did not write it: name another, or give --overwrite")
        if held is not None and (found := differences(held, settings, groups)):
            if not overwrite:
                raise ValueError(
                    f"--output {output} is that of another job ({'; '.join(found)}): name another file, or give --overwrite"
                )
            held = None
        if isinstance(held, Report):
            if output.stat().st_size == held.bytes and hash_file(output) == held.hash:
                shutil.rmtree(parts, ignore_errors=True)
                return held, []
            held = None
        if held is None or held.input.identity != groups.identity():
            scanned = groups.scan(held.block_texts if held else block_texts)
            if held is None:
                shutil.rmtree(parts, ignore_errors=True)
                parts.mkdir()
            held = Job(
                bge_ds_version=__version__, settings=settings, input=scanned,
                block_texts=held.block_texts if held else block_texts,
            )  # fmt: skip
            files.write(parts / JOB, held)
        # Under the lock: a rank that has nothing left may finish the job and remove the parts at any time.
        return held, _unfinished(output, range(rank, held.num_blocks, world))


def write_block(output: Path, job: Job, block: int, groups: list[Group], counts: dict[str, int]) -> None:
    """A finished block. Raises ValueError where another run has replaced or finished the job meanwhile."""
    path = _parts(output) / JOB
    if not path.is_file() or _read(path, Job) != job:
        raise ValueError(f"--output {output}: another run has replaced or finished what is there: give each its own file")
    body = b"".join(orjson.dumps(group, option=orjson.OPT_APPEND_NEWLINE) for group in groups)
    head = {"counts": counts, "hash": xxhash.xxh3_128_hexdigest(body)}
    content = orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE) + body
    _explained(lambda: write_whole(_block_path(output, block), content, writer=f".{os.getpid()}"), output)


def finish(output: Path, job: Job) -> Report | None:
    """Writes the output and its report where every block is there. None: other ranks are at it still."""
    parts = _parts(output)
    with locked(parts):
        if not (parts / JOB).is_file():
            return _read(_report_path(output), Report)
        if _read(parts / JOB, Job) != job:
            raise ValueError(f"--output {output}: another run has replaced what is there: give each its own file")
        if not all(_block_path(output, block).is_file() for block in range(job.num_blocks)):
            return None
        partial = output.with_name(output.name + PARTIAL)
        counts = _explained(lambda: _join(output, job, partial), output)
        made = Report(
            **msgspec.structs.asdict(job), counts=counts, bytes=partial.stat().st_size, hash=hash_file(partial)
        )  # fmt: skip
        os.replace(partial, output)
        files.write(_report_path(output), made)
        (parts / JOB).unlink()
        shutil.rmtree(parts)
        return made


# ------------------------------------------------------------------------------------------------------------- the parts


def _unfinished(output: Path, blocks: range) -> list[int]:
    """Those of `blocks` that are not there, or not as they were written; the latter are removed."""
    left = []
    for block in blocks:
        path = _block_path(output, block)
        if path.is_file() and _block(path) is None:
            path.unlink()
        if not path.is_file():
            left.append(block)
    return left


def _join(output: Path, job: Job, partial: Path) -> dict[str, int]:
    """Writes all blocks one after the other; the sums of their counts."""
    counts: Counter[str] = Counter()
    with open(partial, "wb") as file:
        # Neither a name nor a time in it: the bytes depend on the content alone.
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if job.settings.compressed else None
        for block in range(job.num_blocks):
            path = _block_path(output, block)
            if (found := _block(path)) is None:
                raise ValueError(f"{path} is damaged: run the same command again, which scores its groups anew")
            counts.update(found[0])
            (packed or file).write(found[1])
        if packed is not None:
            packed.close()
        file.flush()
        os.fsync(file.fileno())
    return dict(counts)


def _block(path: Path) -> tuple[dict[str, int], bytes] | None:
    """(counts, lines) of a block; None where its bytes are not those that were written."""
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        told = orjson.loads(head)
    except orjson.JSONDecodeError:
        return None
    return (told["counts"], body) if told["hash"] == xxhash.xxh3_128_hexdigest(body) else None


def _explained(write: Callable[[], Made], output: Path) -> Made:
    try:
        return write()
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror}: fix that; the same command continues") from error


def _parts(output: Path) -> Path:
    return output.with_name(output.name + PARTS)


def _report_path(output: Path) -> Path:
    return output.with_name(output.name + REPORT)


def _block_path(output: Path, block: int) -> Path:
    return _parts(output) / f"{block:06d}.jsonl"


def _read(path: Path, kind: type[Made]) -> Made:
    """A typed JSON file. Raises ValueError, which names the file and the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}: it was edited, or another version wrote it: remove it to begin anew") from None
