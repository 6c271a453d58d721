"""Gathering across ranks with gradients, and reductions. On one rank, or before the process group, the identity.

NCCL's rules, which hold everywhere here: each tensor is contiguous, of a type that NCCL knows, and on this rank's device; every
rank issues the same collectives in the same order. Those of Python objects (`broadcast_object`, `gather_object`,
`on_first_rank`) make the host wait for the GPU twice: they belong to the start, to saves and to the end, never to a step or a
line of the log (`tests/distributed/test_nccl_rules.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from bge_ds.distributed.communication_profile import call

# Renamed in newer versions of torch, which warn at the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_T = TypeVar("_T")
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def leave() -> None:
    """Leave the process group, so that the interpreter may end.

    A gloo thread frees the tensors of its last collective after whoever waited for it has gone on, and takes the interpreter's
    lock to do so. Where the interpreter ends first, it is killed at that lock and takes the process with it ("terminate called
    without an active exception", status 134). Freeing a group waits for its threads, but DeepSpeed keeps some groups for good:
    for theirs, this sleeps, which hands over the lock that they stand at.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    gc.collect()  # an engine is a web of cycles, and holds groups
    time.sleep(0.1)


class _AllGatherRows(torch.autograd.Function):
    """Forward: every rank's rows, rank after rank. Backward: the gradients of a rank's rows, summed over all ranks.

    Each rank's loss uses every rank's rows, so a row's gradient is a sum over ranks; DeepSpeed divides by their number
    once, after the backward, which makes it the gradient of the mean of the ranks' losses.
    """

    @staticmethod
    def forward(ctx, x_ND):
        out = x_ND.new_empty((world_size() * x_ND.shape[0], *x_ND.shape[1:]))
        call("all_gather", _all_gather, out, x_ND.contiguous())
        ctx.rows = x_ND.shape[0]
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        if dist.get_backend() == "gloo":
            # Its reduce-scatter takes as long as an all-reduce; exchanging the parts and adding them here, half of that.
            parts = torch.empty_like(grad)
            call("all_to_all", dist.all_to_all_single, parts, grad)
            return parts.unflatten(0, (world_size(), ctx.rows)).sum(0)
        out = grad.new_empty((ctx.rows, *grad.shape[1:]))
        call("reduce_scatter", _reduce_scatter, out, grad)
        return out


def all_gather_rows(x_ND: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
    """The rows of all ranks, rank after rank, with gradients.

    counts: rows each rank brings, where they differ (None: the same everywhere, which costs no padding).
    """
    if world_size() == 1:
        return x_ND
    if counts is None or len(set(counts)) == 1:
        return _AllGatherRows.apply(x_ND)
    most = max(counts)
    missing = x_ND.new_zeros((most - x_ND.shape[0], *x_ND.shape[1:]))
    rows = _AllGatherRows.apply(torch.cat([x_ND, missing]))
    return torch.cat([rows[r * most : r * most + n] for r, n in enumerate(counts)])


def gather_counts(n: int, device: torch.device) -> list[int]:
    """Each rank's n. Waits for the device: not for the steps, where `exchange_ahead` is."""
    return [numbers[0] for numbers in _Exchange([n], device).result()]


class _Exchange:
    """A few whole numbers of each rank on their way to all ranks; every rank brings as many."""

    def __init__(self, numbers: list[int], device: torch.device):
        self.own, self.table, self.arrived = numbers, None, None
        if world_size() == 1 or not numbers:
            return
        on_gpu = device.type == "cuda"
        own = torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=True)
        table = own.new_empty(world_size() * len(numbers))
        call("all_gather", _all_gather, table, own)
        self.table = torch.empty(table.shape, dtype=table.dtype, pin_memory=on_gpu)
        self.table.copy_(table, non_blocking=True)
        if on_gpu:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def result(self) -> list[list[int]]:
        """The numbers of each rank."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.table is None:
            return [self.own] * world_size()
        return self.table.unflatten(0, (world_size(), -1)).tolist()


def exchange_ahead(
    steps: Iterable[_T], numbers_of: Callable[[_T], list[int]], device: torch.device
) -> Iterator[tuple[_T, list[list[int]]]]:
    """Each step with the numbers that every rank has for it, asked for before the step in front of it is computed.

    So the answer is on the host when its step begins, and a GPU's queue never runs empty for it. Every rank must take
    equally many steps, and bring equally many numbers to each.
    """
    waiting = None
    for step in steps:
        asked = step, _Exchange(numbers_of(step), device)
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = asked
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def largest(n: int, device: torch.device) -> int:
    """The largest n of any rank."""
    return n if world_size() == 1 else int(max_over_ranks(torch.tensor(n, device=device)))


def _copied(values: torch.Tensor) -> torch.Tensor:
    """What may be reduced in place: a collective takes elements as they lie in memory, which a view's layout may change."""
    return values.detach().clone(memory_format=torch.contiguous_format)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks (a new tensor, no gradient)."""
    values = _copied(values)
    if world_size() > 1:
        call("all_reduce", dist.all_reduce, values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    values = _copied(values)
    if world_size() > 1:
        call("all_reduce", dist.all_reduce, values, op=dist.ReduceOp.MAX)
    return values


def barrier() -> None:
    """Every rank is here, and on a GPU has done what it was given to do.

    NCCL's barrier reduces a number on a GPU. Where it is not told which, it may take the rank modulo the host's GPUs: another
    rank's, wherever ranks and GPUs are not numbered alike, and both wait for ever.
    """
    if world_size() > 1:
        on_nccl = dist.get_backend() == "nccl"
        call("barrier", dist.barrier, device_ids=[torch.cuda.current_device()] if on_nccl else None)


def broadcast_object(value):
    """Rank 0's value, everywhere (plain Python data)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_object(value) -> list:
    """Every rank's value (plain Python data), on every rank."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def on_first_rank(work: Callable[[], _T]) -> _T:
    """What `work` gives on rank 0 (plain Python data), on every rank.

    Its failure is raised on all, since a rank alone would wait for ever: a ValueError or OSError as a ValueError, any other as
    itself on rank 0 and as a RuntimeError that names it on the others.
    """
    result = failure = None
    if rank() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    is_mistake = isinstance(failure, ValueError | OSError)
    said = failure and (str(failure) if is_mistake else f"rank 0 failed: {type(failure).__name__}: {failure}")
    said, is_mistake = broadcast_object((said, is_mistake))
    if is_mistake:
        raise ValueError(said) from failure
    if failure is not None:
        raise failure
    if said is not None:
        raise RuntimeError(said)
    return broadcast_object(result)
