"""The command `python -m bge_ds.mine` with small blocks, which may kill itself at any of its writes to the disk.

Arguments: texts of a block of vectors, groups of a block, number of the write from 0 (-1: none) or "plan" (half of its
texts, or of shards half of its files, are written), "output" (half written), "replace" (report written, output not in its
place) or "remove" (of the work folder), the command's own.
"""

import itertools
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

from bge_ds import mine
from bge_ds.data.shards import manifest_file
from bge_ds.encoding import manifest, output, run
from bge_ds.mining import lines, shards, work
from programs.encode_command import kill, killed_in_write


def then_kill(texts):
    yield from itertools.islice(texts, 10)
    kill()


def kill_or(move, old, new):
    """Moves a file or folder that is not the output."""
    if re.fullmatch(r"\.mined(\.jsonl)?\.partial.*", Path(old).name):
        kill()
    move(old, new)


def main(block: str, groups: str, moment: str, *words: str) -> None:
    run.BLOCK, work.SMALLEST, work.BLOCKS = int(block), int(groups), 1000
    writes = killed_in_write(moment, output, manifest, work, manifest_file)
    if moment == "plan":
        write_texts = lines._write_texts
        lines._write_texts = lambda path, texts, count: write_texts(path, then_kill(texts), count)
        write_arrays = shards.write_arrays
        shards.write_arrays = lambda *given: (write_arrays(*given), kill())
    elif moment == "output":
        write = lines.Lines._write
        lines.Lines._write = lambda self, path, name, negatives: write(self, path, name, then_kill(negatives))
        groups = shards.Shards._write_groups
        shards.Shards._write_groups = lambda self, target, negatives: groups(self, target, then_kill(negatives))
    elif moment == "replace":
        for name in ("replace", "rename"):
            move = getattr(os, name)
            setattr(os, name, partial(kill_or, move))
    elif moment == "remove":
        rmtree = shutil.rmtree
        work.shutil.rmtree = lambda path, **how: kill() if (path / "job.json").exists() else rmtree(path, **how)
    status = mine.main(list(words))
    print(len(writes), flush=True)
    sys.exit(status)
