"""A process with loader workers that waits to be killed ("orphan"), or whose step fails ("failing" and a folder of shards)."""

import sys
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


def main(kind: str, folder: str = "") -> None:
    if kind == "orphan":
        batches = iter(DataLoader(Large(), batch_size=None, num_workers=1, worker_init_fn=_follow_rank, prefetch_factor=8))
        next(batches)
        print(batches._workers[0].pid, flush=True)
        sys.stdin.read()
        return
    order = EpochSampler(seed=3, spans=((0, 60),), global_batch=8)
    steps = dataloader.steps(
        [Path(folder)], order, collate.collate_texts, first_step=0, end_step=50, accumulation=1, rank=0, world=1, workers=2,
        pin_memory=False, seed=3, max_seq_length=12, encoder_share=0.3,
    )  # fmt: skip
    next(iter(steps))
    raise RuntimeError("the step failed")
