"""What files hold, as hashes that are remembered: the processes of a host read a large file once, not once each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from bge_ds.data.files import hash_file, write_whole

if TYPE_CHECKING:
    from bge_ds.data.preprocess.input_files import Source

NAME = "digests.json"
REMEMBERED = 10_000  # files; the oldest are forgotten


def of_sources(sources: list[Source], base: Path) -> list[Any]:
    """What decides a cache's name of inputs: each file's ending, size and the hash of its bytes, not its name."""
    files = [file for source in sources for file in source.files()]
    hashes = dict(zip(files, of_files(files, base), strict=True))
    found: list[Any] = []
    for source in sources:
        if source.hub:
            found.append([str(source.hub), source.hub.revision])
        found += [[file.suffix, file.stat().st_size, hashes[file]] for file in source.files()]
    return found


def of_files(files: list[Path], base: Path) -> list[str]:
    """The xxh3_128 of each file, kept in `base` by path, size, times and inode, all of which a change of the file changes."""
    from filelock import FileLock

    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / f"{NAME}.lock"):  # the first process hashes, the others wait and find what it kept
        return _look_up(files, base / NAME)


def _look_up(files: list[Path], path: Path) -> list[str]:
    try:
        known = orjson.loads(path.read_bytes())
        assert isinstance(known, dict)
    except (OSError, ValueError, AssertionError):
        known = {}
    before, found = dict(known), []
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
        found.append(known.pop(key, None) or hash_file(file))
        known[key] = found[-1]  # last, as the one asked for last
    if known.keys() != before.keys():
        write_whole(path, orjson.dumps(dict(list(known.items())[-REMEMBERED:])))
    return found
