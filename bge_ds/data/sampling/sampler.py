"""Which rows a step sees, as arithmetic on (seed, epoch, step).

An epoch's order is a keyed permutation evaluated where it is needed (a Feistel network over the smallest 4^k that holds
N, walked until the value falls below N), so that memory does not grow with the data, a resumed run costs nothing, and
any number of ranks cuts the same global batches from the same sequence. Nothing is stored but the rows near the last step.

The rule at an epoch's end: epochs are laid end to end, and step s takes places [s G, (s+1) G) of that line, G texts a
global batch. Every text is seen exactly once an epoch, no batch is short, and only the last step of a run may take
its missing texts from the epoch after the last (or is left out, with `drop_last`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_GOLDEN, _MUL_1, _MUL_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LAST = (1 << 64) - 1
_ROUNDS = 6
_STRETCH = 4096  # places that are looked up together: hashing 16 costs as much as hashing 4,096


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


def permute(places_K: np.ndarray, size: int | np.ndarray, *key: int | np.ndarray) -> np.ndarray:
    """The images (int64, shape K) of places in 0..size-1 under the permutation of 0..size-1 that `key` names.

    `size` and parts of the key may be arrays of shape K: each place then goes through its own permutation.
    """
    values, seeds = np.array(places_K, np.uint64), mix64(*key)
    if seeds.size > 1 and (seeds == seeds[0]).all():
        seeds = seeds[0]  # one permutation, as nearly always: its round keys are hashed once, not for each place
    rounds = [_absorb(0, seeds, number) for number in range(_ROUNDS)]  # what hashing a round's half begins with
    half, size = _half_bits(size), np.asarray(size, np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    walking = np.arange(values.size)

    def of_walking(values: np.ndarray | int) -> np.ndarray | int:
        return values if np.size(values) == 1 else values[walking]

    while walking.size:
        value, half_here, low_here = values[walking], of_walking(half), of_walking(low)
        left, right = value >> half_here, value & low_here
        for state in rounds:
            left, right = right, left ^ (_absorb(of_walking(state), right) & low_here)
        value = (left << half_here) | right
        values[walking] = value
        walking = walking[value >= of_walking(size)]
    return values.astype(np.int64)


def _half_bits(size: int | np.ndarray) -> np.ndarray:
    """Half the bits of the smallest power of 4 that holds `size` places, uint64 of its shape."""
    sizes, which = np.unique(np.asarray(size, np.int64), return_inverse=True)
    bits = [max(1, -(-max(1, each - 1).bit_length() // 2)) for each in sizes.tolist()]
    return np.array(bits, np.uint64)[which].reshape(np.shape(size))


class Sampler:
    """Base sampler: an infinite sequence of (epoch, row), cut into global batches.

    A sampler has a `seed`, a `global_batch` (texts an optimizer step consumes, over all ranks and accumulation steps), a
    length (the texts of an epoch) and `rows_at`; the rest follows.
    """

    seed: int
    global_batch: int

    def __len__(self) -> int:
        raise NotImplementedError

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at consecutive places of the sequence."""
        raise NotImplementedError

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many of the first `texts` texts come from each set."""
        raise NotImplementedError

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_G, rows_G) of one optimizer step over all ranks, in batch order."""
        steps = max(1, _STRETCH // self.global_batch)
        stretch, inside = divmod(step, steps)
        kept = self.__dict__.get("_stretch")  # the one asked for last; not a field, as samplers are frozen
        if kept is None or kept[0] != stretch:
            size = steps * self.global_batch
            kept = stretch, *self.rows_at(np.arange(stretch * size, (stretch + 1) * size, dtype=np.int64))
            self.__dict__["_stretch"] = kept
        part = slice(inside * self.global_batch, (inside + 1) * self.global_batch)
        return kept[1][part].copy(), kept[2][part].copy()

    def micro_batches(self, step: int, accumulation: int, rank: int, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(epochs_N, rows_N) of each accumulation step of one rank in one optimizer step."""
        epochs, rows = self.step_rows(step)
        return [(epochs[part], rows[part]) for part in rank_slice(len(rows), accumulation, rank, world)]

    def filled_steps(self, epochs: float) -> float:
        """Optimizer steps that the texts of `epochs` (may be a fraction) fill: a fraction in general."""
        return len(self) * epochs / self.global_batch

    def steps(self, epochs: float, drop_last: bool = False) -> int:
        """Optimizer steps that `epochs` (may be a fraction) take: with the last one that begins, or only what is full."""
        filled = self.filled_steps(epochs)
        return math.floor(filled + 1e-9) if drop_last else math.ceil(filled - 1e-9)

    def epochs(self, steps: int) -> float:
        """How many epochs the first `steps` steps walk through."""
        return steps * self.global_batch / len(self)


@dataclass(frozen=True)
class EpochSampler(Sampler):
    """Epochs end to end, each a permutation of the kept rows (without `shuffle`: the rows in order).

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
        """How many of the first `texts` texts come from each span, on average."""
        return self.kept * (texts / len(self))

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at any places of the sequence of all epochs laid end to end."""
        return self._rows.at(places_K, 0)

    @cached_property
    def _rows(self) -> RowLookup:
        return RowLookup((self,))


class RowLookup:
    """The rows of many `EpochSampler`s at once, with as many numpy calls for a thousand of them as for one."""

    def __init__(self, lines: tuple[EpochSampler, ...]) -> None:
        self.shuffle = lines[0].shuffle
        self.sizes = np.array([len(line) for line in lines], np.int64)
        self.seeds = np.array([line.seed for line in lines], np.uint64)
        self.begin = np.cumsum(self.sizes) - self.sizes  # of each line's kept rows among those of all lines
        self.kept = np.concatenate([line.kept for line in lines])
        self.ends = np.cumsum(self.kept)
        self.starts, span_ends = np.array([span for line in lines for span in line.spans], np.int64).reshape(-1, 2).T
        self.span_sizes = span_ends - self.starts
        self.numbers = np.concatenate([np.arange(len(line.spans)) for line in lines])  # each span's, within its line

    def at(self, places_K: np.ndarray, lines_K: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at places of the lines `lines_K` (one for all, or one each)."""
        sizes_K, seeds_K = self.sizes[lines_K], self.seeds[lines_K]
        epochs_K, index_K = np.divmod(places_K, sizes_K)
        if self.shuffle:
            index_K = permute(index_K, sizes_K, seeds_K, 1, epochs_K)
        index_K = index_K + self.begin[lines_K]
        span_K = np.searchsorted(self.ends, index_K, side="right")
        within_K = index_K - (self.ends - self.kept)[span_K]
        cut = (self.kept < self.span_sizes)[span_K]
        if cut.any():  # the same subsample of a span in every epoch
            seeds_K = np.broadcast_to(seeds_K, span_K.shape)[cut]
            span = span_K[cut]
            within_K[cut] = permute(within_K[cut], self.span_sizes[span], seeds_K, 2, self.numbers[span])
        return epochs_K, self.starts[span_K] + within_K


def rank_slice(global_batch: int, accumulation: int, rank: int, world: int) -> list[slice]:
    """Where each accumulation step of one rank lies in a global batch: step by step, rank after rank."""
    micro = global_batch // (accumulation * world)
    return [slice((a * world + rank) * micro, (a * world + rank + 1) * micro) for a in range(accumulation)]
