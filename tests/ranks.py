"""Ranks that may fail: started directly, each with a log of its own, and waited for."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import forked
import helpers


@dataclass
class Ranks:
    """Processes of one run, by rank; each writes into `log(rank)`."""

    folder: Path
    port: str
    processes: dict[int, forked.Process | subprocess.Popen]

    def log(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.log").read_text()

    def wait_for(self, text: str, rank: int = 0, seconds: float = 120) -> None:
        """Until a rank has written what the pattern `text` matches."""
        deadline = time.monotonic() + seconds
        while not re.search(text, self.log(rank)):
            assert self.processes[rank].poll() is None, f"rank {rank} has ended\n{self.log(rank)[-4000:]}"
            assert time.monotonic() < deadline, f"no {text!r} from rank {rank} in {seconds} s\n{self.log(rank)[-4000:]}"
            time.sleep(0.05)

    def statuses(self, seconds: float) -> list[int]:
        """Exit statuses (below 0: of that signal), all within so many seconds."""
        deadline = time.monotonic() + seconds
        for rank, process in self.processes.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} still runs after {seconds} s\n{self.log(rank)[-4000:]}") from None
        return [process.returncode for process in self.processes.values()]

    def everything(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.log(rank)[-3000:]}" for rank in self.processes)


@contextlib.contextmanager
def started(
    name: str, ranks: int, folder: Path, *args: object, leave_out: tuple[int, ...] = (), **variables: str
) -> Iterator[Ranks]:
    """Run a program of `tests/programs` as the ranks of one group, without those of `leave_out`; all are killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Ranks(folder, str(helpers.free_port()), {})
    try:
        for rank in sorted(set(range(ranks)) - {*leave_out}):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = helpers.environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=found.port, PYTHONPATH=helpers.PYTHONPATH,
                PYTHONUNBUFFERED="1", **({name: str(number) for name, number in places.items()} | variables),
            )  # fmt: skip
            with open(folder / f"rank-{rank}.log", "w") as log:
                found.processes[rank] = helpers.start_program(name, [str(arg) for arg in args], environment, log, log)
        yield found
    finally:
        for process in found.processes.values():
            process.kill()
            process.wait()
