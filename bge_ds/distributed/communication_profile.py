"""What a rank spends in collectives, waiting included, and which rank keeps the others waiting.

DeepSpeed's collectives and those of `collectives.py` go through `call`. It counts while a `Pace` has a step under way, so that
neither an evaluation nor a save shows among the steps.
"""

from __future__ import annotations

import functools
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

# Methods of DeepSpeed's backend -> the kind that they are counted as.
_METHODS = {
    "all_reduce": "all_reduce", "all_reduce_coalesced": "all_reduce", "inference_all_reduce": "all_reduce",
    "all_gather": "all_gather", "all_gather_into_tensor": "all_gather", "all_gather_base": "all_gather",
    "all_gather_coalesced": "all_gather", "all_gather_object": "all_gather",
    "reduce_scatter": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter", "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all", "broadcast": "broadcast", "broadcast_object_list": "broadcast",
    "reduce": "reduce", "barrier": "barrier",
}  # fmt: skip
SLOW = 1.3  # times the median, from which on a rank is named


class _Counters:
    """Calls and bytes by kind, and seconds, since the last reading. On a GPU a time is a pair of events until it is read."""

    def __init__(self):
        self.active = False
        self.clear()

    def clear(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, float] = defaultdict(float)
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def read_seconds(self) -> float:
        for first, last in self.events:
            last.synchronize()
            self.seconds += first.elapsed_time(last) / 1000
        self.events.clear()
        return self.seconds

    def timed(self, on_gpu: bool, work: Callable):
        """What `work()` gives; its time on the current stream, or on a CPU that of the call, is added."""
        if on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            result = work()
            pair[1].record()
            self.events.append(pair)
            return result
        began = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - began
        return result


_counters = _Counters()


class _Handle:
    """A collective under way, whose wait is timed too."""

    def __init__(self, handle, on_gpu: bool):
        self._handle, self._on_gpu = handle, on_gpu

    def wait(self, *args, **kwargs):
        return _counters.timed(self._on_gpu, lambda: self._handle.wait(*args, **kwargs))

    def __getattr__(self, name: str):
        return getattr(self._handle, name)


def call(kind: str, collective: Callable, *args, **kwargs):
    """collective(*args, **kwargs), timed and counted. Its largest argument is the message: of a gather what comes out."""
    if not _counters.active:
        return collective(*args, **kwargs)
    given = [*args, *kwargs.values()]
    message, on_gpu = max((_size(value) for value in given), default=(0, False))
    group = kwargs.get("group") or next((value for value in args if isinstance(value, dist.ProcessGroup)), None)
    _counters.calls[kind] += 1
    _counters.bytes[kind] += moved(kind, message, dist.get_world_size(group) if dist.is_initialized() else 1)
    result = _counters.timed(on_gpu, lambda: collective(*args, **kwargs))
    return _Handle(result, on_gpu) if hasattr(result, "wait") else result


def moved(kind: str, message: float, ranks: int) -> float:
    """Bytes that each rank sends (and receives) for a message of so many bytes, by an algorithm that sends nothing twice."""
    return message * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


def _size(value) -> tuple[int, bool]:
    """(bytes, whether on a GPU) of a tensor or of a list of tensors; 0 of anything else."""
    tensors: Iterable = value if isinstance(value, list | tuple) else (value,)
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in found), any(t.is_cuda for t in found)


def watch(backend) -> None:
    """Have the collectives of DeepSpeed's backend object counted, once."""
    for name, kind in _METHODS.items():
        method = getattr(backend, name, None)
        if method is not None and not hasattr(method, "counted"):
            counted = functools.partial(call, kind, method)
            counted.counted = True
            setattr(backend, name, counted)


class Pace:
    """The time of steps, of this rank and of all; `say` is told which rank is slow.

    A step's time is from `begin` to `end`. What of it is not spent in collectives is the rank's own: loading, to `loaded`, and
    computing.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None] = lambda words: None):
        self.device, self.say = device, say
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.hosts = [socket.gethostname()] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(self.hosts, self.hosts[0])
        self.clear()

    def clear(self) -> None:
        self.seconds, self.loading, self.steps, self.tokens = 0.0, 0.0, 0, 0
        _counters.clear()

    def begin(self) -> None:
        self.began = time.perf_counter()
        _counters.active = True

    def loaded(self) -> None:
        """The step's batch is there."""
        self.loading += time.perf_counter() - self.began

    def end(self, tokens: int) -> None:
        _counters.active = False
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        self.tokens += tokens

    def traffic(self) -> tuple[dict[str, float], dict[str, float]]:
        """(bytes moved, calls) a step since the last reading, by kind of collective, of this rank."""
        return tuple({kind: n / self.steps for kind, n in found.items()} for found in (_counters.bytes, _counters.calls))

    def read(self) -> dict[str, float]:
        """What the log says of the steps since the last reading; on every rank. Seconds are a step's. Starts anew."""
        spent = min(_counters.read_seconds(), self.seconds)
        numbers = [self.seconds, spent, self.seconds - spent, self.tokens, self.loading]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        table_R5 = own[None]
        if self.ranks > 1:
            rows = [torch.empty_like(own) for _ in range(self.ranks)]
            dist.all_gather(rows, own)
            table_R5 = torch.stack(rows)
        steps = self.steps
        self.clear()
        seconds_R, spent_R, own_R, tokens_R, loading_R = table_R5.cpu().unbind(1)
        own_R = own_R / steps
        slowest, median = int(own_R.argmax()), float(own_R.median())  # of an even number, the lower of the middle two
        rates_R = tokens_R / seconds_R
        if own_R[slowest] > SLOW * median:
            self.say(
                f"rank {slowest} on {self.hosts[slowest]} is the slowest: {own_R[slowest]:.2f} s a step of its own work, "
                f"the median is {median:.2f} s"
            )
        return {
            "communication_share": float(spent_R.sum() / seconds_R.sum()),
            "loader_share": float(loading_R.sum() / seconds_R.sum()),
            "slowest_rank": slowest,
            "slowest_rank_seconds": float(own_R[slowest]),
            "median_rank_seconds": median,
            "tokens_per_second_per_rank": float(rates_R.mean()),
            "tokens_per_second_lowest": float(rates_R.min()),
            "tokens_per_second_highest": float(rates_R.max()),
        }
