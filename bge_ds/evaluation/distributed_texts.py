"""Texts, or pairs of texts, that the ranks of a run encode together, the same way on any number of ranks.

Shapes: N texts or pairs, R ranks, D features (1 of a score).

They are divided into units of consecutive ones, and one rank takes each unit. So neither the batches nor any bit of the result
depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from bge_ds.data.pairs import PairLayout, Pairs
from bge_ds.data.ragged import RaggedArrays
from bge_ds.distributed import collectives
from bge_ds.evaluation import retrieval
from bge_ds.kernels.packed import PackedPairs, chunk_bounds, pack_pairs, runs_of

UNITS = 128  # least number of units of a large corpus: the ranks' shares then differ little
SMALLEST_UNIT, LARGEST_UNIT = 64, retrieval.BLOCK  # texts


class _Distributed:
    """`count` rows, of which this rank has every R-th unit. A forward pass holds at most batch_tokens tokens, or one row.

    A subclass tells the rows of a unit, and what a model is given of them.
    """

    def __init__(self, count: int, batch_tokens: int, device: torch.device):
        rank, world = collectives.rank(), collectives.world_size()
        self.count, self.batch_tokens, self.device = count, batch_tokens, device
        self.size = min(LARGEST_UNIT, max(SMALLEST_UNIT, -(-count // UNITS)))
        units = torch.arange(count).split(self.size)
        self.order_N = torch.cat([unit for r in range(world) for unit in units[r::world]])  # rank by rank
        self.counts_R = [sum(map(len, units[r::world])) for r in range(world)]
        self.own = range(rank, len(units), world)

    def rows(self, unit: int) -> Pairs:
        raise NotImplementedError

    def _input(self, pieces: PackedPairs) -> Any:
        raise NotImplementedError

    def _count_passes(self) -> None:
        own = sum(len(self._bounds(self.rows(unit).ids)) - 1 for unit in self.own)
        self.passes = collectives.largest(own, self.device)

    def _bounds(self, rows: RaggedArrays) -> list[int]:
        """Where to cut the rows, packed by length, into pieces."""
        return chunk_bounds(runs_of(rows.lengths), None, self.batch_tokens)

    def encode(self, model: nn.Module) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first row, N x D fp32) of each unit of this rank.

        Under ZeRO-3 every forward issues collectives, so all ranks make as many passes as the one that needs most. An
        additional pass yields 0 x D.
        """
        done = 0
        for unit in self.own:
            rows = self.rows(unit)
            packed = pack_pairs(rows.ids.split(), rows.second)
            pieces = packed.split(self._bounds(rows.ids))
            done += len(pieces)
            found_ND = torch.cat([self._forward(model, piece) for piece in pieces])
            yield unit * self.size, found_ND[packed.texts.place_N.to(self.device)]
        for _ in range(done, self.passes):
            yield self.count, self._forward(model, pack_pairs([np.zeros(1, np.int64)]))[:0]

    def _forward(self, model: nn.Module, piece: PackedPairs) -> torch.Tensor:
        found = model(self._input(piece).to(self.device)).float()
        return found if found.dim() == 2 else found[:, None]

    def encode_all(self, model: nn.Module) -> torch.Tensor:
        """What the model gives for all rows, N x D fp32, on every rank."""
        own_ND = torch.cat([found_ND for _, found_ND in self.encode(model)])
        found_ND = collectives.all_gather_rows(own_ND, self.counts_R)
        out_ND = torch.empty_like(found_ND)
        out_ND[self.order_N.to(self.device)] = found_ND
        return out_ND


class DistributedTexts(_Distributed):
    """`count` texts for an encoder; each rank tokenizes its own, once."""

    def __init__(
        self, texts: Iterable[str], count: int, to_ids: Callable, largest_id: int, batch_tokens: int, device: torch.device
    ):
        super().__init__(count, batch_tokens, device)
        texts, self._rows = iter(texts), {}
        for unit, first in enumerate(range(0, count, self.size)):
            some = list(islice(texts, min(self.size, count - first)))
            if unit in self.own:
                self._rows[unit] = RaggedArrays.of_lists(to_ids(some), np.min_scalar_type(largest_id))
        self._count_passes()

    def rows(self, unit: int) -> Pairs:
        return Pairs(self._rows[unit], None)

    def _input(self, piece: PackedPairs) -> Any:
        return piece.texts


class DistributedPairs(_Distributed):
    """Pairs for a cross-encoder: of the texts `left` and `right`, those numbered left_N and right_N.

    to_ids: texts -> their ids without special tokens. Each rank tokenizes the texts of its own pairs, once.
    """

    def __init__(
        self, left: list[str], right: list[str], left_N: np.ndarray, right_N: np.ndarray, to_ids: Callable,
        layout: PairLayout, cuts: dict[str, int], batch_tokens: int, device: torch.device,
    ):  # fmt: skip
        super().__init__(len(left_N), batch_tokens, device)
        self._layout, self._cuts, self._sides = layout, cuts, []
        parts = [slice(unit * self.size, (unit + 1) * self.size) for unit in self.own]
        for texts, index_N in ((left, left_N), (right, right_N)):
            used, place = np.unique(np.concatenate([index_N[:0], *(index_N[part] for part in parts)]), return_inverse=True)
            rows = to_ids([texts[number] for number in used.tolist()])
            ends = np.cumsum([len(index_N[part]) for part in parts])[:-1]
            self._sides.append((rows, dict(zip(self.own, np.split(place, ends), strict=False))))
        self._count_passes()

    def rows(self, unit: int) -> Pairs:
        left, right = (rows.take(of[unit]) for rows, of in self._sides)
        return self._layout.build(left, right, **self._cuts)

    def _input(self, piece: PackedPairs) -> Any:
        return piece
