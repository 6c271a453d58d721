"""Micro batches by tokens: the sequence of a sampler, cut into bins that hold as many whole texts as a budget allows.

A bin takes texts in the order of the line while their tokens fit. Step s of W ranks and A accumulation steps takes bins
[s W A, (s+1) W A), and bin s W A + a W + r is accumulation step a of rank r: what a bin holds depends on the seed, the
texts and the budget, never on the ranks.

Where bin b begins follows from the bins before it, so the line is packed in chunks of fixed size, whose ends close
their last bin. Of each chunk only the number of its bins is kept; a step is found by these numbers and packs its chunk
again, a few hundredths of a second once in thousands of texts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bge_ds.data.sampling.sampler import Sampler

CHUNK = 1 << 16  # texts; one bin in hundreds is closed early


class _Packed(NamedTuple):
    """One chunk of the line. bounds: where its bins begin, and the chunk's end, counted from the chunk's first place."""

    chunk: int
    epochs_K: np.ndarray
    rows_K: np.ndarray
    bounds: np.ndarray


@dataclass(eq=False)
class TokenBatchSampler(Sampler):
    """A sampler whose micro batches are cut by tokens instead of by number of texts.

    line: the places; the size of its batches plays no part. lengths: rows -> tokens of each text, before it is cut.
    budget: most tokens of a bin, at least max_seq_length. step_bins: bins of an optimizer step, over all ranks and
    accumulation steps.
    """

    line: Sampler
    lengths: Callable[[np.ndarray], np.ndarray]
    max_seq_length: int
    budget: int
    step_bins: int
    chunk: int = CHUNK
    # Bins from the line's beginning to the end of each chunk counted so far. It goes along to the loader's workers.
    _counted: list[int] = field(default_factory=list, init=False, repr=False)
    _last: _Packed | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Rows an epoch sees."""
        return len(self.line)

    @property
    def seed(self) -> int:
        return self.line.seed

    def filled_steps(self, epochs: float) -> float:
        """Optimizer steps, a fraction in general, whose bins begin within the first `epochs` (may be a fraction)."""
        place = math.ceil(len(self) * epochs - 1e-9)
        chunk, inside = divmod(place, self.chunk)
        self._count(chunk)
        begun = int(np.searchsorted(self._pack(chunk).bounds[:-1], inside)) if inside else 0
        return (self._before(chunk) + begun) / self.step_bins

    def epochs(self, steps: int) -> float:
        """How many epochs the first `steps` steps walk through."""
        packed, k = self._find(steps * self.step_bins)
        return (packed.chunk * self.chunk + int(packed.bounds[k])) / len(self)

    def micro_batches(self, step: int, accumulation: int, rank: int, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(epochs_N, rows_N) of each accumulation step of one rank in one optimizer step."""
        return [self.bin(step * self.step_bins + a * world + rank) for a in range(accumulation)]

    def bin(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_N, rows_N) of one bin, found directly."""
        packed, k = self._find(number)
        part = slice(packed.bounds[k], packed.bounds[k + 1])
        return packed.epochs_K[part], packed.rows_K[part]

    def _find(self, number: int) -> tuple[_Packed, int]:
        """The chunk of a bin, and which of its bins it is."""
        while not self._counted or self._counted[-1] <= number:
            self._count(len(self._counted) + 1)
        chunk = bisect_right(self._counted, number)
        return self._pack(chunk), number - self._before(chunk)

    def _before(self, chunk: int) -> int:
        return self._counted[chunk - 1] if chunk else 0

    def _count(self, chunks: int) -> None:
        """Know the bins of the first `chunks` chunks."""
        while (known := len(self._counted)) < chunks:
            self._counted.append(self._before(known) + len(self._pack(known).bounds) - 1)

    def _pack(self, chunk: int) -> _Packed:
        if self._last is None or self._last.chunk != chunk:
            places_K = np.arange(chunk * self.chunk, (chunk + 1) * self.chunk, dtype=np.int64)
            epochs_K, rows_K = self.line.rows_at(places_K)
            lengths_K = np.minimum(self.lengths(rows_K), self.max_seq_length)
            self._last = _Packed(chunk, epochs_K, rows_K, cut_by_tokens(lengths_K, self.budget))
        return self._last


def cut_by_tokens(lengths_K: np.ndarray, budget: int) -> np.ndarray:
    """Where bins begin that take texts in order while they fit, and the end: [0, ..., K].

    A single text that is longer than the budget is a bin of its own.
    """
    size = len(lengths_K)
    ends_K = np.cumsum(lengths_K)
    # The bin that would follow one that begins at each text; of all these, those are wanted that are reached from 0.
    follower = np.searchsorted(ends_K, ends_K - lengths_K + budget, side="right")
    follower = np.append(np.maximum(follower, np.arange(size) + 1), size)
    # With n bins known and `follower` leading n bins on, one look-up gives n more: a loop over bits, not over bins.
    starts = np.zeros(1, np.int64)
    while starts[-1] < size:
        starts = np.append(starts, follower[starts])
        follower = follower[follower]
    return starts[: np.searchsorted(starts, size) + 1]
