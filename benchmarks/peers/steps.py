"""What is recorded of a peer's own trainer, step by step; runs in the peer's environment and changes nothing it computes.

A side of the benchmark is a program that takes one JSON text (the fields of a setting in ../sides.py) and prints, as
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


class TokenCounter:
    """A trainer's `training_step`, with the tokens of each batch counted on the way: real ones, and places of its rectangles.

    Here and not in the collator, which may run in a worker process and ahead of the steps.
    """

    def __init__(self, training_step):
        self.training_step, self.counts, self.padded = training_step, [], []

    def __call__(self, model, inputs, *rest, **options):
        masks = [*_masks(inputs)]
        self.counts.append([mask.sum() for mask in masks])  # read after the run: nobody waits for a GPU here
        self.padded.append(sum(mask.numel() for mask in masks))
        return self.training_step(model, inputs, *rest, **options)

    @property
    def tokens(self) -> list[int]:
        return [sum(int(count) for count in counts) for counts in self.counts]


def _masks(batch):
    """Masks of texts, one number a token; RetroMAE's decoder has matrices beside them."""
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and name.endswith("attention_mask"):
            if value.dim() == 2:
                yield value
        elif hasattr(value, "items"):
            yield from _masks(value)


def measure(trainer, train, packages: tuple[str, ...], cuda: bool, counter: type[TokenCounter] = TokenCounter) -> None:
    """Run `train()` of a built Hugging Face trainer and print the result line."""
    timer, counter = StepTimer(cuda), counter(trainer.training_step)
    trainer.training_step = counter
    trainer.add_callback(timer)
    train()
    report(timer.seconds, counter.tokens, counter.padded, timer.peak, packages)


def report(seconds: list[float], tokens: list[int], padded: list[int], peak: int, packages: tuple[str, ...]) -> None:
    """The result line."""
    versions = {name: version(name) for name in packages}
    line = {"seconds": seconds, "tokens": tokens, "padded": padded, "peak_bytes": peak, "versions": versions}
    print(json.dumps(line), flush=True)
