"""The command `python -m bge_ds.encode` with small blocks, which may kill itself in the middle of its n-th write to the disk.

Arguments: texts of a block, number of the write from 0 (-1: none) or "clean" (after the manifest), the command's own.
"""

import os
import signal
import sys
from types import ModuleType

from bge_ds import encode
from bge_ds.encoding import manifest, output, run


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_write(moment: str, *modules: ModuleType) -> list:
    """Has this process die when half of the n-th file that these modules write is on the disk; the list of all so far."""
    write_whole, writes = modules[0].write_whole, []

    def write(path, content, sync=True, writer=""):
        writes.append(path)
        if str(len(writes) - 1) == moment:
            path.with_name(f"{path.name}{writer}.partial").write_bytes(bytes(content)[: len(content) // 2])
            kill()
        write_whole(path, content, sync, writer)

    for module in modules:
        module.write_whole = write
    return writes


def main(block: str, moment: str, *words: str) -> None:
    run.BLOCK = int(block)
    writes = killed_in_write(moment, output, manifest)
    if moment == "clean":
        output._clean = lambda folder: kill()
    status = encode.main(list(words))
    print(len(writes), flush=True)
    sys.exit(status)
