"""A command's time and the peak memory of its whole tree of processes, seen from outside; standard library only."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from sides import HERE, SideFailed


def tree_memory(root: int) -> int:
    """Bytes that a process and all below it own: a shared page counts once, one that a file backs not at all."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    tree, size = {root}, 0
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        size += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return size


def watched(command: list[str], env: dict[str, str], log: Path) -> tuple[float, int, str]:
    """(seconds, peak bytes of the whole tree, looked at 20 times a second, standard output) of a command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    out = log.with_suffix(".out")
    with log.open("w") as errors, out.open("w") as output:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, cwd=HERE.parent)
        try:
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid))
                time.sleep(0.05)
        finally:
            process.kill()  # where this one was interrupted; nothing to one that has ended
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SideFailed(f"{' '.join(command[:3])} ... failed, see {log}:\n" + log.read_text(encoding="utf-8")[-1500:])
    return seconds, peak, out.read_text(encoding="utf-8")
