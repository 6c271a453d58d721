"""A command's time and the peak memory of its whole tree of processes, seen from outside; standard library only."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from sides import HERE, SideFailed

OFTEN, SELDOM = 0.1, 1.0  # seconds from one look to the next, and from one exact count to the next
RISE = 1.005  # that calls for an exact count at once


def tree_of(root: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def memory_of(tree: set[int], file: str, names: tuple[str, ...]) -> int:
    """Bytes that some lines of a file in /proc give for all processes of a tree."""
    size = 0
    for pid in tree:
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
            size += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(names))
    return size


class Peak:
    """The most bytes that a tree of processes owned: a shared page counts once, one that a file backs not at all.

    An exact count walks all pages, 10 ms or more for a gigabyte, while the process waits for its own: done at every look
    it would slow down the side that needs more memory. So it is done where a rough count, which has shared pages once for
    each process, has risen, and once a second.
    """

    def __init__(self) -> None:
        self.bytes = self._rough = 0
        self._counted = 0.0

    def look(self, root: int) -> None:
        tree, now = tree_of(root), time.perf_counter()
        rough = memory_of(tree, "status", ("RssAnon:", "RssShmem:"))
        if rough > RISE * self._rough or now > self._counted + SELDOM:
            self.bytes = max(self.bytes, memory_of(tree, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")))
            self._rough, self._counted = max(rough, self._rough), now


def watched(command: list[str], env: dict[str, str], log: Path) -> tuple[float, int, str]:
    """(seconds, peak bytes of the whole tree, standard output) of a command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    out = log.with_suffix(".out")
    with log.open("w") as errors, out.open("w") as output:
        began, peak = time.perf_counter(), Peak()
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, cwd=HERE.parent)
        try:
            while process.poll() is None:
                peak.look(process.pid)
                time.sleep(OFTEN)
        finally:
            process.kill()  # where this one was interrupted; nothing to one that has ended
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SideFailed(f"{' '.join(command[:3])} ... failed, see {log}:\n" + log.read_text(encoding="utf-8")[-1500:])
    return seconds, peak.bytes, out.read_text(encoding="utf-8")
