"""A process with loader workers. The kind of it and a folder of shards:

- "orphan" (no folder): waits to be killed.
- "failing": its step fails.
- "hanging" N: all workers of the first N forks hang in the fork; prints the rows of the first step.
"""

import mmap
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from bge_ds.data import collate, dataloader
from bge_ds.data.dataloader import _follow_rank
from bge_ds.data.sampling.sampler import EpochSampler


class Large(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> bytes:
        return b"x" * (1 << 22)  # more than the pipe holds


def hang_in_fork(times: int) -> None:
    """The next `times` children of this process never come back from their fork."""
    forks = mmap.mmap(-1, 1)  # shared with the children

    def in_child() -> None:
        forks[0] += 1
        if forks[0] <= times:
            time.sleep(1000)

    os.register_at_fork(after_in_child=in_child)


def main(kind: str, folder: str = "", times: str = "0") -> None:
    if kind == "orphan":
        start = partial(_follow_rank, multiprocessing.Semaphore(0))
        batches = iter(DataLoader(Large(), batch_size=None, num_workers=1, worker_init_fn=start, prefetch_factor=8))
        next(batches)
        print(batches._workers[0].pid, flush=True)
        sys.stdin.read()
        return
    order = EpochSampler(seed=3, spans=((0, 60),), global_batch=8)
    steps = dataloader.steps(
        [Path(folder)], order, collate.collate_texts, first_step=0, end_step=50, accumulation=1, rank=0, world=1, workers=2,
        pin_memory=False, seed=3, max_seq_length=12, encoder_share=0.3,
    )  # fmt: skip
    if kind == "hanging":
        dataloader.PATIENCE_S = (2.0, 2.0, 10.0)
        hang_in_fork(int(times))
        batches = iter(steps)
        print(next(batches)[0].texts.ids_T.tolist(), len(multiprocessing.active_children()), flush=True)
        return
    next(iter(steps))
    raise RuntimeError("the step failed")
