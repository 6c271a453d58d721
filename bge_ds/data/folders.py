"""The folder that shards are written to: it gets its name when all is in it, and nothing foreign is ever replaced."""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from bge_ds.data.shards import MANIFEST, SKIPPED


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary sibling folder to write in, and renames it to `output` when the block ends without an error.

    A non-empty `output` is refused, unless `overwrite` is set and it holds nothing but shards: then it is replaced.
    Raises ValueError before anything is written."""
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):  # a killed run cannot clean up after itself
        if not _alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    partial = output.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        check_output(output, overwrite)
        old = partial.with_name(partial.name + ".old")
        if output.exists():
            os.rename(output, old)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ValueError where `new_folder` could not take `output`'s name."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: --output names a folder")
    held = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if held and not overwrite:
        raise ValueError(f"{output} is not empty (it holds {held[0]}): name another folder, or give --overwrite")
    foreign = [name for name in held if name not in (MANIFEST, SKIPPED) and not name.endswith(".arrow")]
    if foreign:
        raise ValueError(f"{output} holds {foreign[0]}, which is no part of shards: --overwrite replaces only those")


def _alive(pid: str) -> bool:
    """Whether a process of this number runs on this host; what is not a number is left alone."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True
