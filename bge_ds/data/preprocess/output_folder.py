"""The folder that shards are written to: it gets its name when all is in it, and nothing foreign is ever replaced.

Until then it is a sibling named after the output and the job. A killed run leaves it, and the same job continues in it;
another job has another name. A lock beside it keeps a second run off the output.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bge_ds.data.shards.manifest_file import MANIFEST, PART, SKIPPED

JOURNAL = "segments"  # the folder of what is known of each segment, see segment_writer.py


@contextlib.contextmanager
def new_folder(
    output: Path, overwrite: bool = False, job: str = "new", say: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """Gives a sibling folder to write in, and renames it to `output` when the block ends without an error.

    The folder is the one that an earlier, killed run of the same `job` (a hash) left, or a new one. It stays where
    the block is killed or interrupted; after a ValueError only where some segment is finished. A non-empty `output` is
    refused, unless `overwrite` is set and it holds nothing but shards: then it is replaced.
    Raises ValueError before anything is written, for a second run on one output too."""
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(output):
        check_output(output, overwrite)
        partial = output.parent / f".{output.name}.partial-{job[:16]}"
        old = output.with_name(f".{output.name}.partial-old")
        left = output.parent.glob(f".{glob.escape(output.name)}.partial-*")
        others = sorted(path for path in left if path not in (partial, old))
        for other in others:
            say(f"{other} is what another job left unfinished: it is removed when this one has written {output}")
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        except Exception as error:
            kept = _finished_segments(partial)
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            elif isinstance(error, ValueError):
                say(f"{kept} finished segments are kept in {partial}: the same command, with --on_error skip too, uses them")
            raise
        check_output(output, overwrite)
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            os.rename(output, old)
        os.rename(partial, output)
        for path in (old, *others):
            shutil.rmtree(path, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ValueError where `new_folder` could not take `output`'s name."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: --output names a folder")
    held = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if held and not overwrite:
        raise ValueError(f"{output} is not empty (it holds {held[0]}): name another folder, or give --overwrite")
    foreign = [name for name in held if name not in (MANIFEST, SKIPPED, PART, JOURNAL) and not name.endswith(".arrow")]
    if foreign:
        raise ValueError(f"{output} holds {foreign[0]}, which is no part of shards: --overwrite replaces only those")


def _finished_segments(partial: Path) -> int:
    """How many there are to continue from: none where they hold no row."""
    if not any(partial.glob("*.arrow")):
        return 0
    return sum(1 for path in partial.glob(f"{JOURNAL}/*.json") if re.fullmatch(r"[a-z]+-\d+-\d+", path.stem))


@contextlib.contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Holds the lock of an output. The system lets go of a killed process's lock, so none is ever left over."""
    from filelock import FileLock, Timeout

    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=1)  # a killed run's workers may take a moment to end
    except Timeout:
        raise ValueError(f"{output}: another process is writing it: wait for its end, or name another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
