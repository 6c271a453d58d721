"""Building DeepSpeed's operations without waiting for the dead.

torch marks an extension that is being compiled by a file, `lock`, and whoever finds that file waits until it is gone. A process
that is killed meanwhile leaves it behind, and from then on every run on the machine would wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)


@contextmanager
def turn(name: str) -> Iterator[None]:
    """To be held while the extension `name` is loaded: one process at a time, and no mark of a dead one is in its way.

    The kernel takes this lock from a process that dies, so that a mark found in here is no other run's of bge_ds. It goes
    unless a process of this machine has it open: another program may be compiling the same.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    if not os.access(folder, os.W_OK):  # nothing is compiled there, then
        yield
        return
    with FileLock(folder / "bge_ds.lock"):
        mark = folder / "lock"
        if mark.exists() and not _is_open(mark):
            logger.warning("%s was left by a process that died while it compiled %s; removed", mark, name)
            mark.unlink(missing_ok=True)
        yield


def _is_open(file: Path) -> bool:
    """Whether a process that this user may look into has the file open; where that cannot be known, it may be."""
    if not Path("/proc/self/fd").is_dir():
        return True
    wanted = str(file.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.readlink(descriptor) == wanted:
                return True
    return False
