"""Batches of texts of similar length: a window of a sampler's batches, sorted by length, as a pure function of the step.

A window holds about WINDOW global batches. Its texts are sorted by length and cut into batches, which the window then
takes in a shuffled order, so that a run does not go from short to long. Windows end where epochs do: at the end of an
epoch, the texts seen are those of the sampler without grouping. The last window is kept, nothing else.
A mixture's shares hold over a window, not within each of its batches: one set's texts may be the longer ones.

Within a batch the sorted texts are halved again and again, each time 0, 3, 4, 7, 8 ... to the one side and 1, 2, 5, 6 ...
to the other, so that the ranks' parts, whatever their number, have equal shares of short and long texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from bge_ds.data.sampling.sampler import Sampler, mix64, permute

WINDOW = 64  # global batches


@dataclass(eq=False)
class LengthGroupedSampler(Sampler):
    """`line` with the texts of each window put into batches of similar length.

    lengths: rows -> tokens of each text. whole_batches: an epoch ends with its last full batch (`mixture.ByEpoch`), not with
    the batch that holds its last text.
    """

    line: Sampler
    lengths: Callable[[np.ndarray], np.ndarray]
    whole_batches: bool = False
    window: int = WINDOW
    _last: tuple = field(default=(-1, None, None), init=False, repr=False)

    def __len__(self) -> int:
        return len(self.line)

    @property
    def seed(self) -> int:
        return self.line.seed

    @property
    def global_batch(self) -> int:
        return self.line.global_batch

    def texts_of_sets(self, texts: int) -> np.ndarray:
        """How many of the first `texts` texts of `line` come from each set; within a window this is not exact."""
        return self.line.texts_of_sets(texts)

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs_G, rows_G) of one optimizer step over all ranks, in batch order."""
        first, end = self._window(step)
        if self._last[0] != first:
            self._last = (first, *self._sorted(first, end))
        _, epochs_NG, rows_NG = self._last
        batch = int(permute(np.array([step - first]), end - first, self.seed, 4, first)[0])
        dealt_G = deal(self.global_batch)
        # The halving leaves the extremes to one side; which side that is must not always be the same rank's.
        dealt_G = dealt_G[::-1] if mix64(self.seed, 5, step) & np.uint64(1) else dealt_G
        return epochs_NG[batch][dealt_G], rows_NG[batch][dealt_G]

    def _window(self, step: int) -> tuple[int, int]:
        """The steps [first, end) of the window around a step: an epoch's batches in even parts."""
        size, texts = self.global_batch, len(self.line)
        if self.whole_batches:
            epoch = ((step + 1) * size - 1) // texts
            begin, end = epoch * texts // size, (epoch + 1) * texts // size
        else:
            epoch = step * size // texts
            begin, end = -(-epoch * texts // size), -(-(epoch + 1) * texts // size)
        parts = -(-(end - begin) // self.window)
        part = ((step - begin + 1) * parts - 1) // (end - begin)
        return begin + part * (end - begin) // parts, begin + (part + 1) * (end - begin) // parts

    def _sorted(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        epochs_K, rows_K = self.line.rows_at(np.arange(first * self.global_batch, end * self.global_batch, dtype=np.int64))
        order_K = np.argsort(self.lengths(rows_K), kind="stable")
        return epochs_K[order_K].reshape(-1, self.global_batch), rows_K[order_K].reshape(-1, self.global_batch)


@lru_cache(maxsize=8)
def deal(size: int) -> np.ndarray:
    """Which of a batch's texts, counted from the shortest, lies at each place (int64, shape `size`)."""

    def halve(ranks: np.ndarray) -> list[np.ndarray]:
        if len(ranks) < 2:
            return [ranks]
        outer = np.isin(np.arange(len(ranks)) % 4, (0, 3))
        return halve(ranks[outer]) + halve(ranks[~outer])

    return np.concatenate(halve(np.arange(size)))
