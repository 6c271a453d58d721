"""Hashes of files, and small files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import xxhash

PARTIAL = ".partial"


def hash_file(path: Path) -> str:
    """The xxh3_128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes | memoryview, sync: bool = True, writer: str = "") -> None:
    """Replaces a file atomically: after a kill it holds either the old content or all of the new.

    With `sync` the same holds after a power cut; without it, the file may then be empty. writer: a name of this process's own
    where another may write the same file at the same time."""
    partial = path.with_name(f"{path.name}{writer}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:  # a full disk: the half of a file helps nobody
        partial.unlink(missing_ok=True)
        raise


def link_or_copy(path: Path, target: Path) -> None:
    """Gives a file a second name: a hard link, which stays valid when the first is removed, or a copy on another disk."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copy2(path, target)  # another disk, or one without hard links
