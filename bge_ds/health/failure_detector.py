"""Failure detection: a rank that dies, hangs or fails ends the run on all ranks; a signal stops all after a common step.

How a dead rank is noticed: before it opens its data, every rank connects to rank 0 (`rendezvous`). A thread of each rank
(`watcher`) sends a heartbeat over that connection every 2 s. A closed connection, or 30 s of silence, is a lost rank: rank 0
tells the others, and every process ends with exit code LOST. Nothing in the main thread delays it.
On SIGTERM or SIGUSR1 rank 0 proposes a last step to all ranks (`preemption`).

This module has the functions that the main thread calls.
"""

from __future__ import annotations

import os
import signal

import torch.distributed as dist

from bge_ds.health.watcher import SIGNALS, Watcher

_current: Watcher | None = None


def _forget() -> None:
    """In a forked child, whose copies of the sockets would keep the connections of a killed rank open."""
    global _current
    if _current is None:
        return
    if _current.handlers:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _current.close()
    _current = None


os.register_at_fork(after_in_child=_forget)


def join(timeout_s: float) -> None:
    """Starts the watch and waits until all ranks have joined. Ends the process where one has not joined in time."""
    global _current
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _current = Watcher(rank, world if "RANK" in os.environ else 1, timeout_s)
    _current.start()


def leave(keep_ignoring: bool = False) -> None:
    """Ends the watch, which is no failure. keep_ignoring: SIGTERM and SIGUSR1 are ignored until the process ends."""
    global _current
    if _current is not None:
        _current.leave(keep_ignoring)
        _current = None


def store() -> dist.Store | None:
    """The store of the rendezvous; None for one rank and without a watch."""
    return None if _current is None else _current.store


def several() -> bool:
    """Whether several ranks are watched."""
    return _current is not None and _current.world > 1


def fail(status: int, message: str) -> None:
    """Where there are several ranks, ends this process after an error that it has printed; otherwise does nothing.

    The other ranks end with the same status and name this rank, unless they find the same error themselves. The process ends
    in here, since leaving the process group may wait for ranks that wait for this one.
    """
    if several():
        _current.fail(status, message)


def await_cause(seconds: float = 10.0) -> None:
    """To be called on an error that another rank's death may have caused. If so, the process ends in here with that message."""
    if several():
        _current.await_cause(seconds)


def last_step(step: int) -> int | None:
    """The step after which all ranks are to stop, after a signal. Every rank calls it at the end of each step.

    It waits for other ranks only between a signal and the agreement on the step.
    """
    return None if _current is None else _current.stop.done(step)


def stopper() -> str:
    """The signal that stops the run and the rank that received it."""
    return "" if _current is None else _current.stop.by
