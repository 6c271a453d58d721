"""Arrays of different lengths, end to end: what many rows of a table, or the texts of a batch, are handled as.

Shapes: K arrays, T values of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

_LONG = 128  # values an array from which copying stretch by stretch is quicker than looking up each value
_MOST_COUNTED = 1 << 20
_counted = np.arange(0)


class RaggedArrays(NamedTuple):
    """values_T: of all arrays, one after the other. lengths_K: int64, how many each has."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> RaggedArrays:
        return cls(np.concatenate(arrays), np.fromiter(map(len, arrays), np.int64, len(arrays)))

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[int]], dtype: DTypeLike) -> RaggedArrays:
        """The same of lists of numbers."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls(np.fromiter(itertools.chain.from_iterable(lists), dtype, int(lengths.sum())), lengths)

    @classmethod
    def join(cls, parts: Sequence[RaggedArrays]) -> RaggedArrays:
        """The arrays of all parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts]))

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def split(self) -> list[np.ndarray]:
        """Each array, as a view."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.values[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def take(self, order_K: np.ndarray) -> RaggedArrays:
        """The arrays order_K, in that order."""
        lengths_K = self.lengths[order_K]
        return RaggedArrays(stretches(self.values, self.starts[order_K], lengths_K), lengths_K)

    def inner(self, before: int, after: int) -> RaggedArrays:
        """Each array without its first and last values, special tokens of a text; nothing of one that is no longer."""
        lengths_K = np.maximum(self.lengths - before - after, 0)
        return RaggedArrays(stretches(self.values, self.starts + before, lengths_K), lengths_K)

    def at(self, array_K: np.ndarray, index_K: np.ndarray) -> np.ndarray:
        """Value number index_K of each of the arrays array_K."""
        return self.values[self.starts[array_K] + index_K]

    def cut(self, max_length: int, suffix: int) -> RaggedArrays:
        """Each array at most max_length long, its last `suffix` values (a text's closing special tokens) kept."""
        if self.lengths.max(initial=0) <= max_length:
            return self
        lengths_K, ends_K = np.minimum(self.lengths, max_length), np.cumsum(self.lengths)
        kept = stretches(np.arange(len(self.values)), self.starts, lengths_K)
        tail = (np.cumsum(lengths_K)[:, None] - np.arange(suffix, 0, -1))[self.lengths > max_length]
        kept[tail] = (ends_K[:, None] - np.arange(suffix, 0, -1))[self.lengths > max_length]
        return RaggedArrays(self.values[kept], lengths_K)


def stretches(values: np.ndarray, begin_K: np.ndarray, lengths_K: np.ndarray) -> np.ndarray:
    """values[begin : begin + length] of each pair, end to end: a new array."""
    ends_K = np.cumsum(lengths_K)
    size = int(ends_K[-1]) if len(ends_K) else 0
    if size > _LONG * len(ends_K):
        return np.concatenate([values[a:b] for a, b in zip(begin_K.tolist(), (begin_K + lengths_K).tolist(), strict=True)])
    places_T = np.repeat(begin_K - (ends_K - lengths_K), lengths_K)
    places_T += _counting(size)
    return values[places_T]


def _counting(size: int) -> np.ndarray:
    """0, 1, 2, ..., counted once: it is asked for with every look-up. Not to be written to."""
    global _counted
    if size > _MOST_COUNTED:
        return np.arange(size)
    if size > len(_counted):
        _counted = np.arange(min(_MOST_COUNTED, 2 * size))
    return _counted[:size]


def inside(lengths_K: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each of the lengths, end to end."""
    return np.arange(lengths_K.sum()) - np.repeat(np.cumsum(lengths_K) - lengths_K, lengths_K)
