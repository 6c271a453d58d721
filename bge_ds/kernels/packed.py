"""Packed sequences: the texts of a batch end to end in one row, without padding.

Shapes: T tokens of all texts, N texts.

Texts are sorted by length, shortest first, so texts of equal length are neighbours: without a variable-length attention kernel,
each such run is one dense attention call on views (`kernels/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch


class LengthRun(NamedTuple):
    """Neighbouring texts of one length."""

    texts: int
    length: int


class Movable:
    """A dataclass of tensors with `to` and `pin_memory`, and a compact pickle for data loader workers.

    Pickled, integers take the fewest bytes that hold them, and what follows from other fields is left out. A pickled tensor
    would be a shared-memory file of its own, which costs more than copying bytes through a pipe and widening them on arrival.
    """

    def _map(self, change):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: change(v) if isinstance(v, torch.Tensor | Movable) else v for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = True):
        return self._map(lambda v: v.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(lambda v: v.pin_memory())

    def __reduce__(self):
        values = [getattr(self, f.name) for f in fields(self)]
        return _arrived, (type(self), [_narrowed(v) if isinstance(v, torch.Tensor) else v for v in values])


class _Narrow(NamedTuple):
    """A pickled tensor: its values, possibly in a smaller type, and their original type."""

    values: np.ndarray
    dtype: np.dtype


def _narrowed(tensor: torch.Tensor) -> _Narrow:
    values = tensor.numpy()
    return _Narrow(_smallest(values) if values.dtype == np.int64 else values, values.dtype)


def _smallest(values: np.ndarray) -> np.ndarray:
    """The same integers as uint16 or int32 where they fit."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if least >= 0 and most < 1 << 16:
        return values.astype(np.uint16)
    return values.astype(np.int32) if least >= -(1 << 31) and most < 1 << 31 else values


def _arrived(kind: type, values: list) -> Movable:
    return kind(*(torch.from_numpy(v.values.astype(v.dtype, copy=False)) if isinstance(v, _Narrow) else v for v in values))


@dataclass
class PackedTexts(Movable):
    """N texts in one row of T tokens.

    ids_T: token ids, int64. positions_T: position of each token in its text, from 0, int64. cu_seqlens: int32 of N + 1, text
    n is ids_T[cu_seqlens[n]:cu_seqlens[n + 1]]. place_N: int64, the caller's text i is packed text place_N[i]. runs:
    neighbouring texts of one length, in row order; on the host, so that planning never waits for the device.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    place_N: torch.Tensor
    runs: list[LengthRun]

    @property
    def tokens(self) -> int:
        return self.ids_T.numel()

    @property
    def max_length(self) -> int:
        return max(length for _, length in self.runs)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the same texts in a padded rectangle."""
        return self.max_length * self.place_N.numel()

    def split_ids(self) -> list[np.ndarray]:
        """The token ids of each text, in packed order, on the host."""
        return np.split(self.ids_T.cpu().numpy(), self.cu_seqlens[1:-1].cpu().numpy())

    def __reduce__(self):
        return _of_row, (_smallest(self.ids_T.numpy()), np.diff(self.cu_seqlens.numpy()), _smallest(self.place_N.numpy()))


def lay_out(ids_T: np.ndarray, lengths_N: np.ndarray, order_N: np.ndarray) -> PackedTexts:
    """`PackedTexts` of ids and lengths given in row order, integers of any type; packed text k is the caller's order_N[k]."""
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    return _of_row(ids_T, lengths_N, place_N)


def _of_row(ids_T: np.ndarray, lengths_N: np.ndarray, place_N: np.ndarray) -> PackedTexts:
    """`PackedTexts` of ids and lengths given in row order, integers of any type."""
    lengths_N = lengths_N.astype(np.int64, copy=False)
    ends_N = np.cumsum(lengths_N)
    return PackedTexts(
        ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        positions_T=torch.from_numpy(np.arange(ends_N[-1]) - np.repeat(ends_N - lengths_N, lengths_N)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends_N]).astype(np.int32)),
        place_N=torch.from_numpy(place_N.astype(np.int64, copy=False)),
        runs=runs_of(lengths_N),
    )


def pack(texts: Sequence[np.ndarray]) -> tuple[PackedTexts, np.ndarray]:
    """The texts packed by length, and their order: packed text k is the caller's text order[k]."""
    lengths_N = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(lengths_N, kind="stable")
    return lay_out(np.concatenate([texts[k] for k in order]), lengths_N[order], order), order


def runs_of(lengths: np.ndarray | list[int]) -> list[LengthRun]:
    """The runs of texts of these lengths, given in any order."""
    return [LengthRun(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)]


def chunk_bounds(runs: list[LengthRun], max_texts: int | None, max_tokens: int | None) -> list[int]:
    """Where to cut a row greedily so that no piece exceeds max_texts or max_tokens: [0, ..., N].

    A single text longer than max_tokens is a piece of its own.
    """
    bounds, held, tokens = [0], 0, 0
    for n, length in runs:
        for _ in range(n):
            full = (max_texts is not None and held >= max_texts) or (max_tokens is not None and tokens + length > max_tokens)
            if full and held:
                bounds.append(bounds[-1] + held)
                held, tokens = 0, 0
            held, tokens = held + 1, tokens + length
    return [*bounds, bounds[-1] + held]


def split_further(bounds: list[int], pieces: int) -> list[int]:
    """The same cuts and more, until there are `pieces`: the piece with most texts is halved each time.

    Where texts run out, the last pieces are empty: (N, N).
    """
    sizes = np.diff(bounds).tolist()
    while len(sizes) < pieces and max(sizes) > 1:
        largest = sizes.index(max(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    sizes += [0] * (pieces - len(sizes))
    return [0, *np.cumsum(sizes).tolist()]


def spans(starts_N: torch.Tensor, counts_N: torch.Tensor, total: int) -> torch.Tensor:
    """The ranges [start, start + count) of all texts, end to end: int64 of `total`, the sum of the counts (on the host)."""
    shift_N = starts_N - (counts_N.cumsum(0) - counts_N)
    return shift_N.repeat_interleave(counts_N, output_size=total) + torch.arange(total, device=starts_N.device)


def split(texts: PackedTexts, bounds: list[int]) -> list[PackedTexts]:
    """The pieces between the cuts, in packed order, as views; an empty piece holds the row's first text instead."""
    lengths = [length for n, length in texts.runs for _ in range(n)]
    starts = [0, *np.cumsum(lengths).tolist()]
    pieces = []
    for first, last in pairwise(bounds):
        if first == last:
            first, last = 0, 1
        row = slice(starts[first], starts[last])
        cu_seqlens = texts.cu_seqlens[first : last + 1] - starts[first]
        place_N, runs = torch.arange(last - first, device=texts.ids_T.device), runs_of(lengths[first:last])
        pieces.append(PackedTexts(texts.ids_T[row], texts.positions_T[row], cu_seqlens, place_N, runs))
    return pieces


@dataclass
class PackedPairs(Movable):
    """N pairs of query and passage, each one text of a packed row.

    second_N: int64, in packed order: the position in each pair from which token types are 1; None where no model asks for them.
    """

    texts: PackedTexts
    second_N: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.texts.tokens

    @property
    def types_T(self) -> torch.Tensor | None:
        """int64 T: the type of each token, 0 or 1."""
        if self.second_N is None:
            return None
        second_T = self.second_N.repeat_interleave(self.texts.cu_seqlens.diff(), output_size=self.texts.tokens)
        return (self.texts.positions_T >= second_T).long()

    def split(self, bounds: list[int]) -> list[PackedPairs]:
        """As `split` for texts."""
        pieces = split(self.texts, bounds)
        if self.second_N is None:
            return [PackedPairs(piece) for piece in pieces]
        ends = [(first, last) if first < last else (0, 1) for first, last in pairwise(bounds)]
        return [PackedPairs(piece, self.second_N[a:b]) for piece, (a, b) in zip(pieces, ends, strict=True)]


def pack_pairs(pairs: Sequence[np.ndarray], second: np.ndarray | None = None) -> PackedPairs:
    """Pairs packed by length: token ids of each, and the position of each from which types are 1."""
    texts, order = pack(pairs)
    return PackedPairs(texts, None if second is None else torch.from_numpy(second[order].astype(np.int64)))
