"""Which rows a step sees, as arithmetic on (seed, epoch, step).

Nothing here is stored: an epoch's order is a keyed permutation evaluated where it is needed (a Feistel network over
the smallest 4^k that holds N, walked until the value falls below N), so that memory does not grow with the data, a
resumed run costs nothing, and any number of ranks cuts the same global batches from the same line.

The rule at an epoch's end: epochs are laid end to end, and step s takes places [s G, (s+1) G) of that line, G texts a
global batch. Every text is seen exactly once an epoch, no batch is short, and only the last step of a run may take
its missing texts from the epoch after the last (or is left out, with `drop_last`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


def mix64(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integers (arrays broadcast) to uniform uint64, splitmix64's finaliser chained over the keys."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(key) for key in keys)), np.uint64)
    for key in keys:
        state = _absorb(state, key)
    return state


def _absorb(state: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """One more key of `mix64`."""
    if isinstance(key, int):
        key = key % (1 << 64)
    with np.errstate(over="ignore"):
        state = (state ^ np.asarray(key).astype(np.uint64, copy=False)) + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MUL_1
        state = (state ^ (state >> np.uint64(27))) * _MUL_2
        return state ^ (state >> np.uint64(31))


def permute(places_K: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """The images (int64, shape K) of places in 0..size-1 under the permutation of 0..size-1 that `key` names.

    Parts of the key may be arrays of shape K: each place then goes through its own permutation.
    """
    half = np.uint64(max(1, math.ceil(max(1, size - 1).bit_length() / 2)))
    low = np.uint64((1 << int(half)) - 1)
    values = np.array(places_K, np.uint64)
    seeds = mix64(*key)
    if seeds.size > 1 and (seeds == seeds[0]).all():
        seeds = seeds[:1]  # one permutation, as nearly always: its round keys are hashed once, not for each place
    # The rounds hash (seed, round, half of the value).
    rounds = [_absorb(_absorb(np.zeros_like(seeds), seeds), number) for number in range(_ROUNDS)]
    walking = np.arange(values.size)
    while walking.size:
        value = values[walking]
        left, right = value >> half, value & low
        for state in rounds:
            left, right = right, left ^ (_absorb(state if state.size == 1 else state[walking], right) & low)
        value = (left << half) | right
        values[walking] = value
        walking = walking[value >= size]
    return values.astype(np.int64)


class Line:
    """An endless line of texts, cut into global batches: what every order answers to the loops and the loader.

    A line has a `seed`, a `global_batch` (texts an optimizer step consumes, over all ranks and accumulation steps), a
    length (the texts of an epoch) and `rows_at`; the rest follows.
    """

    seed: int
    global_batch: int

    def __len__(self) -> int:
        raise NotImplementedError

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at consecutive places along the line."""
        raise NotImplementedError

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many texts of each set the line's first `texts` are."""
        raise NotImplementedError

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_G, rows_G) of one optimizer step over all ranks, in batch order."""
        return self.rows_at(np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64))

    def micro_batches(self, step: int, accumulation: int, rank: int, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(epochs_N, rows_N) of each accumulation step of one rank in one optimizer step."""
        epochs, rows = self.step_rows(step)
        return [(epochs[part], rows[part]) for part in rank_slice(self.global_batch, accumulation, rank, world)]

    def filled_steps(self, epochs: float) -> float:
        """Optimizer steps that the texts of `epochs` (may be a fraction) fill: a fraction in general."""
        return len(self) * epochs / self.global_batch

    def steps(self, epochs: float, drop_last: bool = False) -> int:
        """Optimizer steps that `epochs` (may be a fraction) take."""
        return whole_steps(self.filled_steps(epochs), drop_last)

    def epochs(self, steps: int) -> float:
        """How many epochs the first `steps` steps walk through."""
        return steps * self.global_batch / len(self)


@dataclass(frozen=True)
class Order(Line):
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

    @cached_property
    def kept(self) -> np.ndarray:
        """Rows kept of each span."""
        sizes = np.array([end - start for start, end in self.spans], np.int64)
        return sizes if self.max_per_span is None else np.minimum(sizes, self.max_per_span)

    def __len__(self) -> int:
        """Rows an epoch sees."""
        return int(self.kept.sum())

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many texts of each span the line's first `texts` are, on average."""
        return self.kept * (texts / len(self))

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at any places along the line of all epochs laid end to end."""
        epochs_K, index_K = np.divmod(places_K, len(self))
        if self.shuffle:
            index_K = permute(index_K, len(self), self.seed, 1, epochs_K)
        ends = np.cumsum(self.kept)
        span_K = np.searchsorted(ends, index_K, side="right")
        starts, sizes = np.array([start for start, _ in self.spans], np.int64), np.array([b - a for a, b in self.spans])
        rows_K = index_K - (ends - self.kept)[span_K] + starts[span_K]
        for span in np.unique(span_K[(self.kept < sizes)[span_K]]):
            here = span_K == span
            rows_K[here] = starts[span] + permute(rows_K[here] - starts[span], int(sizes[span]), self.seed, 2, int(span))
        return epochs_K, rows_K


def whole_steps(filled: float, drop_last: bool) -> int:
    """Steps of a run whose texts fill `filled` of them: the last one that begins is taken, or only what is full."""
    return math.floor(filled + 1e-9) if drop_last else math.ceil(filled - 1e-9)


def rank_slice(global_batch: int, accumulation: int, rank: int, world: int) -> list[slice]:
    """Where each accumulation step of one rank lies in a global batch: step by step, rank after rank."""
    micro = global_batch // (accumulation * world)
    return [slice((a * world + rank) * micro, (a * world + rank + 1) * micro) for a in range(accumulation)]
