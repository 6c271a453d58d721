"""The folder of vectors while it is written: by any number of ranks, which need not talk to each other, and after kills.

Whoever comes first writes down the job, all others find it. Each block has files of its own and then a record, so that a block
with a record is finished; whoever finishes the last one writes the manifest. A lock beside the folder guards the first and the
last step alone. Blocks of another job are never mixed in, and nothing foreign is ever removed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from bge_ds import __version__
from bge_ds.data.files import PARTIAL, write_whole
from bge_ds.data.shards import digests
from bge_ds.data.shards.manifest_file import MANIFEST
from bge_ds.encoding import manifest as files
from bge_ds.encoding.inputs import ShardInput, TextInput
from bge_ds.encoding.manifest import BLOCKS, JOB, BlockEntry, FileEntry, Job, Manifest, Settings
from bge_ds.encoding.number_formats import STORED, to_stored

_OURS = re.compile(rf"(vectors|scales)-\d{{6,}}\.npy|ids-\d{{6,}}\.arrow|{MANIFEST}|{JOB}|{BLOCKS}|.*\{PARTIAL}")
_WRITER = f".{socket.gethostname()}-{os.getpid()}"


def take_up(
    output: Path, settings: Settings, texts: TextInput | ShardInput, block_texts: int, *, known: Path,
    overwrite: bool = False, say: Callable[[str], None] = print,
) -> Job | Manifest:  # fmt: skip
    """The job of the folder `output`: a new one, or that of a killed run, or the manifest where all is done and undamaged.

    Every rank calls it. The input is read and checked where it is new or has been touched. A block whose files are not as its
    record says loses that. known: folder where hashes of files are remembered. Raises ValueError for an output that holds
    something else, and for one of another job unless `overwrite` removes that.
    """
    check_output(output)
    with locked(output):
        held, differs = _held(output, overwrite)
        if held is not None and (found := differences(held, settings, texts)):
            if not overwrite:
                raise ValueError(
                    f"--output {output} holds vectors of another job ({'; '.join(found)}): name another folder, or give "
                    "--overwrite, which removes them"
                )
            held, differs = None, True
        if held is not None:
            records = held.blocks if isinstance(held, Manifest) else [_record(output, k) for k in range(held.num_blocks)]
            damaged = _damaged(output, records, known)
            for problem in damaged.values():
                say(f"{problem}: its block is encoded again")
            if isinstance(held, Manifest) and not damaged:
                _clean(output)
                return held
            if isinstance(held, Manifest):
                held = _reopen(output, held)
            for block in damaged:
                _record_path(output, block).unlink()
        if held is None or held.input.identity != texts.identity():
            block_texts = held.block_texts if held else block_texts
            scanned = texts.scan(block_texts)
            held = Job(bge_ds_version=__version__, settings=settings, input=scanned, block_texts=block_texts)
            _check_room(output, held)
            if differs:
                _remove(output)
            output.mkdir(exist_ok=True)
            files.write(output / JOB, held)
        (output / BLOCKS).mkdir(exist_ok=True)
        return held


def check_output(output: Path) -> None:
    """Raises ValueError for a file, and for a folder that holds anything but vectors."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if foreign := [name for name in held if not _OURS.fullmatch(name)]:
        raise ValueError(f"--output {output} contains {foreign[0]}, which bge_ds.encode did not write: give another folder")
    whole = [name for name in held if not name.endswith(PARTIAL)]
    if whole and not {MANIFEST, JOB} & set(whole):
        raise ValueError(f"--output {output} holds {whole[0]} without {JOB}: name another folder, or empty it")


def unfinished(output: Path, blocks: range) -> list[int]:
    """Those of `blocks` that have no record. Once other ranks have written the manifest, in which all records are: none."""
    with locked(output):
        if (output / MANIFEST).is_file():
            return []
        return [block for block in blocks if not _record_path(output, block).exists()]


def write_block(output: Path, job: Job, block: int, vectors_ND: np.ndarray, ids: list[str] | None, tokens: int) -> None:
    """The files of a block, then its record. vectors_ND: float32, of `job.settings.dim` features. Raises ValueError for NaN."""
    if not (finite_N := np.isfinite(vectors_ND).all(axis=1)).all():
        row = job.rows(block)[int(np.argmin(finite_N))]
        raise ValueError(f"the vector of text {row} (counted from 0) is not finite: check the model, and try without --bf16")
    if _held(output, False)[0] != job:
        raise ValueError(f"--output {output}: another run has replaced or finished what is there: give each its own folder")
    stored_ND, scales_N = to_stored(vectors_ND, job.settings.dtype)
    made = [_write(output / f"vectors-{block:06d}.npy", _as_npy(stored_ND))]
    if ids is not None:
        made.append(_write(output / f"ids-{block:06d}.arrow", _as_arrow(ids)))
    if scales_N is not None:
        made.append(_write(output / f"scales-{block:06d}.npy", _as_npy(scales_N)))
    files.write(_record_path(output, block), BlockEntry(texts=len(vectors_ND), tokens=tokens, files=made), _WRITER)


def finish(output: Path, job: Job) -> Manifest | None:
    """Writes the manifest where every block has a record, and removes what it replaces. None: other ranks are at it still."""
    with locked(output):
        if not (output / MANIFEST).is_file():
            records = []
            for block in range(job.num_blocks):
                if (record := _record(output, block)) is None:
                    return None
                records.append(record)
            files.write(output / MANIFEST, files.make_manifest(job, records))
        _clean(output)
        return files.read_manifest(output)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """One process at a time. The system lets go of a killed process's lock. Where nothing was written, no lock file is left."""
    from filelock import FileLock

    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_path(output)):
        try:
            yield
        finally:
            if not (output / JOB).exists():
                _lock_path(output).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- the parts


def _held(output: Path, overwrite: bool) -> tuple[Job | Manifest | None, bool]:
    """(what the folder says of itself, whether it is to be replaced since that cannot be read)."""
    try:
        if (output / MANIFEST).is_file():
            return files.read_manifest(output), False
        return (files.read(output / JOB, Job) if (output / JOB).is_file() else None), False
    except ValueError:
        if not overwrite:
            raise
        return None, True


def differences(held: Job, settings: Settings, texts: TextInput | ShardInput) -> list[str]:
    """How a job differs from what is asked for now, in words. The input is read only where its files have been touched."""
    found = []
    for name in type(settings).__struct_fields__:
        there, here = getattr(held.settings, name), getattr(settings, name)
        if name == "model_hash" and there != here:
            found.append(f"the files of the model: {held.settings.model} there, {settings.model} here")
        elif name != "model" and there != here:
            found.append(f"{name}: {there!r} there, {here!r} here")
    if not found and held.input.identity != texts.identity():
        now = texts.scan(held.block_texts)
        if now.fingerprint != held.input.fingerprint:
            found.append(f"the texts: {held.input.texts:,} there, {now.texts:,} here, and not the same")
    return found


def _reopen(output: Path, held: Manifest) -> Job:
    """Turns a finished folder back into a job whose blocks are all recorded."""
    (output / BLOCKS).mkdir(exist_ok=True)
    for block, record in enumerate(held.blocks):
        files.write(_record_path(output, block), record)
    job = Job(**{name: getattr(held, name) for name in Job.__struct_fields__})
    files.write(output / JOB, job)
    (output / MANIFEST).unlink()
    return job


def _clean(output: Path) -> None:
    """Removes what the manifest replaces, and what killed runs left half-written."""
    shutil.rmtree(output / BLOCKS, ignore_errors=True)
    for path in (output / JOB, *output.glob(f"*{PARTIAL}")):
        path.unlink(missing_ok=True)


def _damaged(output: Path, records: list[BlockEntry | None], known: Path) -> dict[int, str]:
    """block -> what is wrong with a file of it, in words. Hashes of files that have not changed are remembered in `known`."""
    found, left = {}, []
    for block, record in enumerate(records):
        for entry in record.files if record else []:
            path = output / entry.file
            if path.is_file() and path.stat().st_size == entry.bytes:
                left.append((block, path, entry.hash))
            else:
                found[block] = f"{path} is missing or has not the {entry.bytes:,} bytes that were written"
    hashes = digests.of_files([path for _, path, _ in left], known) if left else []
    for (block, path, written), here in zip(left, hashes, strict=True):
        if here != written:
            found[block] = f"{path} has the hash {here}, {written} was written"
    return found


def _remove(output: Path) -> None:
    """Empties a folder that `check_output` found to hold vectors alone; what says so goes last, as a kill may come between."""
    for path in sorted(output.iterdir(), key=lambda path: path.name in (MANIFEST, JOB)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(output: Path, job: Job) -> None:
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in output.glob("vectors-*.npy"))
    needed = job.input.texts * job.settings.dim * np.dtype(STORED[job.settings.dtype]).itemsize - there
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"--output {output}: the vectors take {needed:,} bytes, and {free:,} are free there")


def _record_path(output: Path, block: int) -> Path:
    return output / BLOCKS / f"{block:06d}.json"


def _record(output: Path, block: int) -> BlockEntry | None:
    path = _record_path(output, block)
    with contextlib.suppress(FileNotFoundError):
        return files.read(path, BlockEntry)
    return None


def _write(path: Path, content: memoryview) -> FileEntry:
    try:
        write_whole(path, content, writer=_WRITER)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: fix that; the same command continues from what is finished") from error
    return FileEntry(file=path.name, bytes=content.nbytes, hash=xxhash.xxh3_128_hexdigest(content))


def _as_npy(values: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getbuffer()


def _as_arrow(ids: list[str]) -> memoryview:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"_id": pa.array(ids, pa.string())})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")
