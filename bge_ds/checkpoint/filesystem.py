"""Folders of a run on disk: flushed, hashed, cleaned up after a kill, and locked by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path

from bge_ds.data.files import PARTIAL as PARTIAL
from bge_ds.data.files import hash_file, write_whole

OLD, LOCK = ".old", "run.lock"
_LEFT_OVER = re.compile(r"(checkpoint-\d+|model|encoder_model|best\.json|metrics\.jsonl)(\.partial|\.old)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without locks
_locked: dict[Path, object] = {}  # the open files, whose locks end with this process

logger = logging.getLogger(__name__)


def sync(folder: Path) -> None:
    """Have everything in a folder, and the folder itself, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hashes(folder: Path, known: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """path within the folder -> (bytes, xxh3_128) of all its files; those in `known` are not read again."""
    found = dict(known)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in found:
            found[name] = path.stat().st_size, hash_file(path)
    return found


def damage(path: Path, size: int, digest: str) -> str | None:
    """What is wrong with a file, in words; None: it is as it was written."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (here := path.stat().st_size) != size:
            return f"{path} has {here:,} bytes, {size:,} were written"
        if (found := hash_file(path)) != digest:
            return f"{path} has the hash {found}, {digest} was written"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), sync=False)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in another's place."""
    old = final.with_name(final.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def merge_folder(new: Path, final: Path, last: tuple[str, ...]) -> None:
    """Move a finished folder's files into another, those in `last` (what makes it loadable) removed first, added last."""
    for name in last:
        (final / name).unlink(missing_ok=True)
    entries = sorted(new.iterdir(), key=lambda p: (last.index(p.name) if p.name in last else -1, p.name))
    for entry in entries:
        target = final / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    new.rmdir()


def clean_up(output_dir: Path) -> None:
    """Remove what a killed run left half-written; put back a folder that was moved aside for one that never came."""
    left = [(path, m) for path in sorted(output_dir.iterdir()) if (m := _LEFT_OVER.fullmatch(path.name))]
    for path, match in left:
        final = output_dir / match[1]
        if match[2] == OLD and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def lock(output_dir: Path, patience_s: float = 10.0) -> None:
    """Lock the folder for this process until it ends. Raises ValueError where another stays for `patience_s`.

    Processes of a run that was just killed may still be going away. A kill gives the lock back.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir.resolve() / LOCK
    if path in _locked:
        return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, it stays open
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning("%s: its file system has no locks; make sure that no second run writes there", output_dir)
                break
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > give_up:
                file.seek(0)
                other = file.read().strip() or "it has not said which"
                file.close()
                raise ValueError(
                    f"--output_dir {output_dir}: another run writes there ({other}); wait for it, stop it, or give another"
                ) from None
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _locked[path] = file
