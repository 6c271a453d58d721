"""Which rows a step sees, as arithmetic on (seed, epoch, step).

An epoch's order is a keyed permutation evaluated where it is needed (a Feistel network over the smallest 4^k that holds
N, walked until the value falls below N), so that memory does not grow with the data, a resumed run costs nothing, and
any number of ranks cuts the same global batches from the same line. Nothing is stored but the rows near the last step.

The rule at an epoch's end: epochs are laid end to end, and step s takes places [s G, (s+1) G) of that line, G texts a
global batch. Every text is seen exactly once an epoch, no batch is short, and only the last step of a run may take
its missing texts from the epoch after the last (or is left out, with `drop_last`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_GOLDEN, _MUL_1, _MUL_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LAST = (1 << 64) - 1
_ROUNDS = 6
_STRETCH = 4096  # places that are looked up together


def mix64(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integers (arrays broadcast) to uniform uint64, splitmix64's finaliser chained over the keys."""
    return np.uint64(_absorb(0, *keys))


def _absorb(state: int | np.ndarray, *keys: int | np.ndarray) -> int | np.ndarray:
    """The state after more keys. Numbers stay Python's until an array comes: numpy costs a microsecond an operation."""
    for key in keys:
        if np.ndim(key) == 0 and isinstance(state, int):
            state = ((state ^ (int(key) & _LAST)) + _GOLDEN) & _LAST
            state = ((state ^ (state >> 30)) * _MUL_1) & _LAST
            state = ((state ^ (state >> 27)) * _MUL_2) & _LAST
            state ^= state >> 31
            continue
        key = np.uint64(int(key) & _LAST) if np.ndim(key) == 0 else np.asarray(key).astype(np.uint64, copy=False)
        state = key ^ (np.uint64(state) if isinstance(state, int) else state)  # an array of its own: changed in place
        state += np.uint64(_GOLDEN)
        state ^= (shifted := state >> np.uint64(30))
        state *= np.uint64(_MUL_1)
        state ^= np.right_shift(state, np.uint64(27), out=shifted)
        state *= np.uint64(_MUL_2)
        state ^= np.right_shift(state, np.uint64(31), out=shifted)
    return state


def permute(places_K: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """The images (int64, shape K) of places in 0..size-1 under the permutation of 0..size-1 that `key` names.

    Parts of the key may be arrays of shape K: each place then goes through its own permutation.
    """
    half = np.uint64(max(1, math.ceil(max(1, size - 1).bit_length() / 2)))
    low = np.uint64((1 << int(half)) - 1)
    values = np.array(places_K, np.uint64)
    rounds = [_absorb(0, mix64(*key), round_) for round_ in range(_ROUNDS)]  # what hashing a round's half begins with
    walking = np.arange(values.size)
    while walking.size:
        value = values[walking]
        left, right = value >> half, value & low
        for state in rounds:
            left, right = right, left ^ (_absorb(state if isinstance(state, int) else state[walking], right) & low)
        value = (left << half) | right
        values[walking] = value
        walking = walking[value >= size]
    return values.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The line of rows that a run walks along.

    spans: (first row, end row) of each input file of the shards, in order.
    global_batch: texts (or groups) an optimizer step consumes, over all ranks and accumulation steps.
    max_per_span: rows kept of each span, drawn once for the run (None: all).
    """

    seed: int
    spans: tuple[tuple[int, int], ...]
    global_batch: int
    max_per_span: int | None = None
    shuffle: bool = True

    @property
    def _kept(self) -> np.ndarray:
        sizes = np.array([end - start for start, end in self.spans], np.int64)
        return sizes if self.max_per_span is None else np.minimum(sizes, self.max_per_span)

    def __len__(self) -> int:
        """Rows an epoch sees."""
        return int(self._kept.sum())

    def filled_steps(self, epochs: float) -> float:
        """Optimizer steps that the texts of `epochs` (may be a fraction) fill: a fraction in general."""
        return len(self) * epochs / self.global_batch

    def steps(self, epochs: float, drop_last: bool = False) -> int:
        """Optimizer steps that `epochs` (may be a fraction) take."""
        return whole_steps(self.filled_steps(epochs), drop_last)

    def epochs(self, steps: int) -> float:
        """How many epochs the first `steps` steps walk through."""
        return steps * self.global_batch / len(self)

    def micro_batches(self, step: int, accumulation: int, rank: int, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(epochs_N, rows_N) of each accumulation step of one rank in one optimizer step."""
        epochs, rows = self.step_rows(step)
        return [(epochs[part], rows[part]) for part in rank_slice(self.global_batch, accumulation, rank, world)]

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_G, rows_G) of one optimizer step over all ranks, in batch order."""
        stretch, inside = divmod(step, max(1, _STRETCH // self.global_batch))
        epochs, rows = _rows_of_stretch(self, stretch)
        part = slice(inside * self.global_batch, (inside + 1) * self.global_batch)
        return epochs[part].copy(), rows[part].copy()

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at places along the line of all epochs laid end to end."""
        epochs_K, index_K = np.divmod(places_K, len(self))
        if self.shuffle:
            index_K = permute(index_K, len(self), self.seed, 1, epochs_K)
        kept = self._kept
        ends = np.cumsum(kept)
        span_K = np.searchsorted(ends, index_K, side="right")
        within_K = index_K - (ends - kept)[span_K]
        rows_K = np.empty_like(index_K)
        for span in np.unique(span_K):
            start, end = self.spans[span]
            here = span_K == span
            inside = within_K[here]
            if kept[span] < end - start:
                inside = permute(inside, end - start, self.seed, 2, int(span))
            rows_K[here] = start + inside
        return epochs_K, rows_K


@lru_cache(maxsize=2)
def _rows_of_stretch(order: Order, stretch: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows) of as many whole steps as come near _STRETCH places: hashing 16 places costs as much as hashing 4,096."""
    size = order.global_batch * max(1, _STRETCH // order.global_batch)
    return order.rows_at(np.arange(stretch * size, (stretch + 1) * size, dtype=np.int64))


def whole_steps(filled: float, drop_last: bool) -> int:
    """Steps of a run whose texts fill `filled` of them: the last one that begins is taken, or only what is full."""
    return math.floor(filled + 1e-9) if drop_last else math.ceil(filled - 1e-9)


def rank_slice(global_batch: int, accumulation: int, rank: int, world: int) -> list[slice]:
    """Where each accumulation step of one rank lies in a global batch: step by step, rank after rank."""
    micro = global_batch // (accumulation * world)
    return [slice((a * world + rank) * micro, (a * world + rank + 1) * micro) for a in range(accumulation)]
