"""What the processes of tests run: one program a module, whose `main` takes the command line's words.

`helpers.run_ranks("state", 2, ...)` runs `programs/state.py` on two ranks, `python tests/programs state ...` in one process.
"""

from __future__ import annotations

import importlib
import os
import sys


def run(name: str, *args: str) -> None:
    """Run a program, and leave the process group that it may have joined."""
    # No test cuts the power, and on a busy disk each fsync takes a tenth of a second, or ten.
    os.fsync = lambda number: None
    sys.argv = [name, *args]
    importlib.import_module(f"programs.{name}").main(*args)
    if "bge_ds.distributed.collectives" in sys.modules:
        sys.modules["bge_ds.distributed.collectives"].leave()
