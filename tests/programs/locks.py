"""A process that holds an output folder or the mark of an extension being compiled, or takes its turn at compiling.

Arguments: "folder" or "mark", and its path; or "turn".
"""

import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from bge_ds.checkpoint import filesystem
from bge_ds.deepspeed_engine import op_builds


def main(kind: str, path: str = "") -> None:
    if kind == "turn":
        with op_builds.turn("cpu_adam"):
            print("in", time.monotonic(), flush=True)
            time.sleep(1)
            print("out", time.monotonic(), flush=True)
        return
    if kind == "folder":
        filesystem.lock(Path(path))
    else:
        assert FileBaton(path).try_acquire()
    print("held", flush=True)
    time.sleep(600)
