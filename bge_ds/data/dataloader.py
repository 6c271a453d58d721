"""Batches ahead of the step that needs them: worker processes over `sampling` and `collate`.

The loader's state is two integers, the seed and the step: step s is found by arithmetic, so a loader that begins there
goes on exactly as one that came from step 0 would, with any number of workers. Nothing of it is in a checkpoint.

A worker hands a batch over as its bytes, packed small (`collate.Movable`), through the loader's queue. They become
tensors where they arrive: in the thread that pins memory where there is a GPU, else in the loop's own process.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from bge_ds.data.sampling.sampler import Sampler
from bge_ds.data.shards import shard_reader

logger = logging.getLogger(__name__)

# Seconds for all workers to start, one attempt after the other. It takes some hundredths; more where cores are short.
PATIENCE_S = (10.0, 30.0, 90.0)


class StepDataset(Dataset):
    """Item s is the list of one rank's accumulation batches of optimizer step s.

    place: (accumulation steps, rank, ranks). collate: (shards, epochs, rows) -> batch. The shards are opened in the process
    that reads them.
    """

    def __init__(self, folders: list[Path], order: Sampler, place: tuple[int, int, int], collate: Callable):
        self.folders, self.order, self.place, self.collate = folders, order, place, collate
        self._shards = None

    def __getstate__(self):
        return {**self.__dict__, "_shards": None}

    def __getitem__(self, step: int) -> list:
        if self._shards is None:
            self._shards = shard_reader.open_folders(self.folders)
        return [self.collate(self._shards, epochs, rows) for epochs, rows in self.order.micro_batches(step, *self.place)]


def _follow_rank(started, _: int) -> None:
    """The start of a worker: signals to all processes of a job are for its rank to act on, and it ends with its rank.

    Without that, a launcher's SIGTERM would take a step's batches away just when they are needed for a last step, and the
    workers of a killed rank would live on for seconds, or for ever where what they have built fills their pipe.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    started.release()


def _end_workers() -> None:
    """At the interpreter's end, what a run that failed has left of them: Python would ask by SIGTERM, and wait without end."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is gone
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class _ForkedLoader(DataLoader):
    """A loader whose forked workers are known to run.

    A fork copies the locks that other threads hold, and nobody releases them in the child. In CPython 3.10 and 3.11 before the
    autumn of 2024 (issue 112275) one of them is the interpreter's list of threads, which a thread of a collective locks without
    the GIL when it lets go of a tensor: a worker forked at that moment hangs before its first line, and all ranks wait for its
    batch. All workers are then started again.
    """

    def __init__(self, *args, started, **options):
        super().__init__(*args, **options)
        self.started = started

    def __iter__(self):
        for patience in PATIENCE_S:
            before = set(multiprocessing.active_children())
            iterator = super().__iter__()
            deadline = time.monotonic() + patience
            if all(self.started.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in range(self.num_workers)):
                return iterator
            logger.warning("a worker of the loader did not start within %g s: all are started again", patience)
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is gone
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
                child.join()
            del iterator
            signal.signal(signal.SIGCHLD, handler)
            while self.started.acquire(block=False):
                pass
        raise RuntimeError(
            f"the loader's workers do not start ({len(PATIENCE_S)} attempts); take --dataloader_multiprocessing_context "
            "forkserver, or --dataloader_num_workers 0"
        )


def steps(
    folders: list[Path],
    order: Sampler,
    collate: Callable,
    *,
    first_step: int,
    end_step: int,
    accumulation: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool,
    prefetch: int | None = None,
    context: str | None = None,
    **collate_options,
) -> DataLoader:
    """An iterator over the rank's batches of steps first_step..end_step-1, in order; each item a list of batches.

    workers: processes that build batches, 0: the caller's own. prefetch: steps that each worker is ahead (None: 2).
    pin_memory: tensors lie in page-locked memory, from which a GPU copies while it computes. context: start method.
    """
    if workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    dataset = StepDataset(folders, order, (accumulation, rank, world), partial(collate, **collate_options))
    common = dict(sampler=range(first_step, end_step), batch_size=None, pin_memory=pin_memory)
    if not workers:
        return DataLoader(dataset, **common)
    processes = multiprocessing.get_context(context)
    started = processes.Semaphore(0)
    common |= dict(num_workers=workers, prefetch_factor=prefetch, multiprocessing_context=processes)
    common |= dict(worker_init_fn=partial(_follow_rank, started))
    if processes.get_start_method() == "fork":
        return _ForkedLoader(dataset, started=started, **common)
    return DataLoader(dataset, **common)
