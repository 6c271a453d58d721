"""Which set each text, or each batch, of a run comes from: again arithmetic on the position, in constant memory.

The sets share a cycle of C places, set i having c_i of them. Place t of the cycle looks at the point (t q + o) mod C, with
q / C near the golden ratio and without a common divisor, and belongs to the set in whose interval of length c_i the point
lies. Over a cycle every point is met once, so that the shares are exact; over any stretch they are right within a few
places, because golden steps fill a circle evenly. How often a set had its turn before place t is a sum of floors,
found in O(log C), so that no position needs those before it.

Each set has a sampler of its own (`EpochSampler`): its epochs laid end to end, none of its texts lost or doubled at
their borders.

By weight, c_i of 2^30 places. Without weights, whole batches of one set (`ByEpoch`): in epoch e, set i of N_i texts has
floor((e+1) N_i / G) - floor(e N_i / G) batches of G texts. What an epoch leaves over, less than a batch, begins the set's
first batch of the next epoch; a set smaller than a batch has one in some epochs only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from bge_ds.data.sampling.sampler import EpochSampler, RowLookup, Sampler, mix64

CYCLE = 1 << 30  # so that a product of two places fits in 63 bits
GOLDEN = (math.sqrt(5) - 1) / 2


def golden_step(size: int) -> int:
    """The whole number next to size / golden ratio that has no divisor in common with `size`."""
    step = max(1, round(size * GOLDEN))
    while math.gcd(step, size) != 1:
        step += 1
    return step


def floor_sums(n: int, size: int, step: int, starts_K: np.ndarray) -> np.ndarray:
    """The sum over t = 0 ... n - 1 of floor((t step + start) / size) for each start (int64, shape K); all below 2^30.

    Sums of whole parts are taken out; what is left counts lattice points under a line, and those are counted again by
    columns in place of rows, which makes the numbers shrink as Euclid's algorithm does.
    """
    n_K, start_K = np.full(len(starts_K), n, np.int64), starts_K.astype(np.int64)
    sums_K = np.zeros_like(start_K)
    while n_K.any():
        sums_K += n_K * (n_K - 1) // 2 * (step // size) + n_K * (start_K // size)
        step, start_K = step % size, start_K % size
        top_K = step * n_K + start_K
        n_K, start_K = top_K // size, top_K % size
        size, step = step, size
    return sums_K


@dataclass(frozen=True)
class Cycle:
    """size = sum(counts) places, counts[i] of them set i's. offset: the point that place 0 looks at; step: see above."""

    counts: tuple[int, ...]
    offset: int
    step: int

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(np.array(self.counts, np.int64))

    def before(self, place: int) -> np.ndarray:
        """How many of the places before `place` each set has, int64 of M sets."""
        size = int(self.ends[-1])
        all_ = floor_sums(place, size, self.step, np.array([self.offset]))
        below = all_ - floor_sums(place, size, self.step, self.offset - self.ends)  # points below each interval's end
        return np.diff(below, prepend=0)

    def at(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(sets_K, turns_K) of places first ... end - 1: whose place it is, and how manieth of that set's, from 0."""
        points_K = (np.arange(first, end, dtype=np.int64) * self.step + self.offset) % int(self.ends[-1])
        sets_K = np.searchsorted(self.ends, points_K, side="right")
        turns_K, before = np.empty(end - first, np.int64), self.before(first)
        by_set = np.argsort(sets_K, kind="stable")
        here, starts = np.unique(sets_K[by_set], return_index=True)
        turns_K[by_set] = np.arange(end - first) - np.repeat(starts - before[here], np.diff([*starts, end - first]))
        return sets_K, turns_K


@dataclass(frozen=True)
class ByWeight:
    """Cycles of CYCLE places, laid end to end. counts: each set's places of a cycle, see `counts_of`."""

    seed: int
    counts: tuple[int, ...]

    @cached_property
    def _cycle(self) -> Cycle:
        size = sum(self.counts)
        return Cycle(self.counts, int(mix64(self.seed, 6) % np.uint64(size)), golden_step(size))

    def before(self, place: int) -> np.ndarray:
        """How many of the places before `place` each set has, int64 of M sets."""
        cycles, inside = divmod(place, sum(self.counts))
        return cycles * np.array(self.counts, np.int64) + self._cycle.before(inside)

    def at(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(sets_K, turns_K) of places first ... end - 1."""
        size, parts = sum(self.counts), []
        while first < end:
            cycle, inside = divmod(first, size)
            until = min(end, (cycle + 1) * size)
            sets_K, turns_K = self._cycle.at(inside, inside + until - first)
            parts.append((sets_K, turns_K + cycle * np.array(self.counts, np.int64)[sets_K]))
            first = until
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def counts_of(shares: list[float], size: int = CYCLE) -> tuple[int, ...]:
    """Whole places of a cycle nearest to the shares (which need not add up to 1); 0 where one is too small for a place."""
    exact = np.array(shares, float) / math.fsum(shares) * size
    counts = np.floor(exact).astype(np.int64)
    most_missing = np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]
    counts[most_missing] += 1
    return tuple(counts.tolist())


@dataclass(frozen=True)
class ByEpoch:
    """Whole batches of one set each; every set once an epoch. sizes: texts of each set. batches: of each one's, or all's."""

    seed: int
    sizes: tuple[int, ...]
    batches: int | tuple[int, ...]
    shuffle: bool = True

    def before_epoch(self, epoch: int) -> int:
        """Batches of all epochs before this one."""
        return int(self._begun(epoch).sum())

    def _begun(self, epoch: int) -> np.ndarray:
        return np.array(self.sizes, np.int64) * epoch // np.array(self.batches, np.int64)

    @cached_property
    def _rate(self) -> Fraction:
        """Batches of an epoch, were none of them cut off at its end."""
        batches = np.broadcast_to(self.batches, len(self.sizes)).tolist()
        return sum((Fraction(size, batch) for size, batch in zip(self.sizes, batches, strict=True)), Fraction(0))

    def epoch_of(self, step: int) -> int:
        """The epoch that holds a batch. M sets begin at most M batches late, which bounds the search."""
        low = math.floor(step / self._rate)
        high = math.floor((step + len(self.sizes) + 1) / self._rate) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.before_epoch(middle) <= step else (low, middle)
        return low

    def _cycle(self, epoch: int) -> Cycle:
        return _cycle_of_epoch(self, epoch)

    def before(self, step: int) -> np.ndarray:
        """How many of the batches before `step` each set has, int64 of M sets."""
        epoch = self.epoch_of(step)
        return self._begun(epoch) + self._cycle(epoch).before(step - self.before_epoch(epoch))

    def at(self, step: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(sets_1, turns_1) of one batch."""
        assert end == step + 1
        epoch = self.epoch_of(step)
        inside = step - self.before_epoch(epoch)
        sets_1, turns_1 = self._cycle(epoch).at(inside, inside + 1)
        return sets_1, turns_1 + self._begun(epoch)[sets_1]


@lru_cache(maxsize=4)
def _cycle_of_epoch(order: ByEpoch, epoch: int) -> Cycle:
    counts = order._begun(epoch + 1) - order._begun(epoch)
    size = int(counts.sum())
    offset = int(mix64(order.seed, 6, epoch) % np.uint64(size))
    # In the order of the data, the sets follow one another.
    return Cycle(tuple(counts.tolist()), *((offset, golden_step(size)) if order.shuffle else (0, 1)))


@dataclass(frozen=True)
class MixtureSampler(Sampler):
    """Texts of several sets in one sequence, by weight. An epoch is as many texts as the sets have together."""

    seed: int
    sets: tuple[EpochSampler, ...]
    shares: ByWeight
    global_batch: int

    def __len__(self) -> int:
        return sum(len(line) for line in self.sets)

    def rows_at(self, places_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_K, rows_K) at consecutive places; each text's epoch is that of its set."""
        sets_K, turns_K = self.shares.at(int(places_K[0]), int(places_K[-1]) + 1)
        return self._rows.at(turns_K, sets_K)

    @cached_property
    def _rows(self) -> RowLookup:
        return RowLookup(self.sets)

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many of the first `texts` texts come from each set."""
        return self.shares.before(texts)


@dataclass(frozen=True)
class SameDatasetBatchSampler(Sampler):
    """Global batches of one set each, the same set on all ranks and in all accumulation steps.

    sets: samplers with batches of `global_batch` texts, or fewer. turns: whose batch a step takes, by epoch or by weight.
    """

    seed: int
    sets: tuple[Sampler, ...]
    turns: ByEpoch | ByWeight
    global_batch: int

    def __len__(self) -> int:
        return sum(len(line) for line in self.sets)

    @cached_property
    def batches(self) -> np.ndarray:
        """Texts of a batch of each set."""
        return np.array([line.global_batch for line in self.sets], np.int64)

    @cached_property
    def _mean_batch(self) -> float:
        """Texts of a step, by weight."""
        counts = self.turns.counts if isinstance(self.turns, ByWeight) else ()
        return sum(n * size for n, size in zip(counts, self.batches.tolist(), strict=True)) / sum(counts)

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_G, rows_G) of one optimizer step; each text's epoch is that of its set."""
        sets_1, turns_1 = self.turns.at(step, step + 1)
        return self.sets[int(sets_1[0])].step_rows(int(turns_1[0]))

    def filled_steps(self, epochs: float) -> float:
        """Optimizer steps of `epochs`: by epoch whole batches, of an epoch's fraction that share."""
        if isinstance(self.turns, ByWeight):
            return len(self) * epochs / self._mean_batch
        whole = math.floor(epochs + 1e-9)
        begun = self.turns.before_epoch(whole)
        return begun + max(0.0, epochs - whole) * (self.turns.before_epoch(whole + 1) - begun)

    def epochs(self, steps: int) -> float:
        """How many epochs the first `steps` steps walk through."""
        if isinstance(self.turns, ByWeight):
            return steps * self._mean_batch / len(self)
        epoch = self.turns.epoch_of(steps)
        begun = self.turns.before_epoch(epoch)
        return epoch + (steps - begun) / (self.turns.before_epoch(epoch + 1) - begun)

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many texts of each set there are in so many steps as `texts` would be, were all batches of `global_batch`."""
        return self.turns.before(texts // self.global_batch) * self.batches
