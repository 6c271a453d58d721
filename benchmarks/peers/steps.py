"""What is recorded of a peer's own trainer, step by step; runs in the peer's environment and changes nothing it computes.

A side of the benchmark is a program that takes one JSON text (the fields of `Setting` in ../contrastive.py) and prints, as
its last line, `{"seconds": [...], "tokens": [...], "padded": [...], "peak_bytes": N, "versions": {...}}`, one entry a step.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version

import torch
from transformers import TrainerCallback


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(cuda: bool) -> int:
    if cuda:
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepTimer(TrainerCallback):
    """From the end of one optimizer step to the end of the next: batches, forward, backward and optimizer together.

    The first step starts where training begins; saving comes after the last and is not in it.
    """

    def __init__(self, cuda: bool):
        self.cuda, self.seconds, self.peak = cuda, [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        synchronize()
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last, self.peak = now, peak_bytes(self.cuda)


class CountingCollator:
    """The peer's collator, with the tokens of each batch counted on the way: real ones, and places of its rectangles."""

    def __init__(self, collator):
        self.collator, self.tokens, self.padded = collator, [], []

    def __getattr__(self, name):
        return getattr(self.collator, name)

    def __call__(self, features):
        batch = self.collator(features)
        masks = [*_masks(batch)]
        self.tokens.append(sum(int(mask.sum()) for mask in masks))
        self.padded.append(sum(mask.numel() for mask in masks))
        return batch


def _masks(batch):
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and name.endswith("attention_mask"):
            yield value
        elif hasattr(value, "items"):
            yield from _masks(value)


def measure(trainer, train, packages: tuple[str, ...], cuda: bool) -> None:
    """Run `train()` of a built Hugging Face trainer and print the result line."""
    timer, collator = StepTimer(cuda), CountingCollator(trainer.data_collator)
    trainer.data_collator = collator
    trainer.add_callback(timer)
    train()
    steps = len(timer.seconds)
    result = {
        "seconds": timer.seconds,
        "tokens": collator.tokens[:steps],
        "padded": collator.padded[:steps],
        "peak_bytes": timer.peak,
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(result), flush=True)
