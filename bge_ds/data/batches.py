"""From rows to a batch: which texts of a group are taken, and all texts of a batch in one row, without padding.

Shapes: T tokens of all texts, N texts, B queries, P passages of one rank's batch.

Texts lie in the row by length, shortest first, so that texts of equal length are neighbours: on devices without a
variable-length attention kernel each such run is one dense attention call on views (`kernels/attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from bge_ds.data.order import mix64


class Run(NamedTuple):
    """Neighbouring texts of one length."""

    texts: int
    length: int


class _Movable:
    """Moves every tensor field, as `torch.utils.data.DataLoader` and the loops ask for."""

    def _map(self, change):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: change(v) if isinstance(v, torch.Tensor | _Movable) else v for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = True):
        return self._map(lambda v: v.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(lambda v: v.pin_memory())


@dataclass
class PackedTexts(_Movable):
    """N texts in one row of T tokens.

    ids_T: token ids, int64. positions_T: place of each token in its text, from 0, int64.
    cu_seqlens: int32 of N + 1, text n is ids_T[cu_seqlens[n]:cu_seqlens[n + 1]].
    place_N: int64, the caller's text i is packed text place_N[i].
    runs: neighbouring texts of one length, in row order; host data, so that planning never waits for the device.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    place_N: torch.Tensor
    runs: list[Run]

    @property
    def tokens(self) -> int:
        return self.ids_T.numel()

    @property
    def max_length(self) -> int:
        return self.runs[-1].length

    @property
    def padded_tokens(self) -> int:
        """What a rectangle of the same texts would hold."""
        return self.max_length * self.place_N.numel()


@dataclass
class ContrastiveBatch(_Movable):
    """Queries and passages of B groups: `texts` holds the B queries first, then the P passages group by group.

    own_BG: int64, the places of each query's group among the P passages, its positive first, -1 where a group is shorter.
    hashes_P: int64, content hash of each passage. known_K, known_query_K: the hashes of every positive listed for a
    query, drawn or not, and the query each belongs to (what must never serve as that query's negative).
    own_only_B: bool, queries of a set that takes no in-batch negatives. teacher_BG: fp32, the teacher's scores, or None.
    """

    texts: PackedTexts
    queries: int
    own_BG: torch.Tensor
    hashes_P: torch.Tensor
    known_K: torch.Tensor
    known_query_K: torch.Tensor
    own_only_B: torch.Tensor
    rows_B: torch.Tensor
    teacher_BG: torch.Tensor | None = None


@dataclass
class PretrainBatch(_Movable):
    """N texts with the word of each token, and a key a text from which every mask is computed on the device.

    words_T: int64 word number of each token in its text. keys_N: int64, hash of (seed, epoch, row), in packed order.
    """

    texts: PackedTexts
    words_T: torch.Tensor
    keys_N: torch.Tensor
    rows_N: torch.Tensor


def cut(ids: np.ndarray, max_length: int, suffix: int) -> np.ndarray:
    """The row at most max_length long, its `suffix` closing special tokens kept."""
    if len(ids) <= max_length:
        return ids
    return np.concatenate([ids[: max_length - suffix], ids[len(ids) - suffix :]])


def pack(texts: list[np.ndarray]) -> tuple[PackedTexts, np.ndarray]:
    """The texts in one row by length, and the order they lie in (packed text k is the caller's text order[k])."""
    lengths = np.fromiter((len(t) for t in texts), np.int64, len(texts))
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return PackedTexts(
        ids_T=torch.from_numpy(np.concatenate([texts[i] for i in order]).astype(np.int64)),
        positions_T=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        place_N=torch.from_numpy(place),
        runs=runs_of(lengths),
    ), order


def runs_of(lengths: np.ndarray | list[int]) -> list[Run]:
    """The runs of texts of these lengths, in whatever order they are given."""
    return [Run(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)]


def chunk_bounds(runs: list[Run], max_texts: int | None, max_tokens: int | None) -> list[int]:
    """Where to cut a row so that no piece has more texts or tokens than allowed: [0, ..., N], as few as follow each other.

    A single text that is longer than max_tokens is a piece of its own.
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
    """The same cuts and more, until there are `pieces`: always the piece with most texts is halved.

    Where texts run out, pieces without a text remain: (n, n) at the end.
    """
    sizes = np.diff(bounds).tolist()
    while len(sizes) < pieces and max(sizes) > 1:
        largest = sizes.index(max(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    sizes += [0] * (pieces - len(sizes))
    return [0, *np.cumsum(sizes).tolist()]


def split(texts: PackedTexts, bounds: list[int]) -> list[PackedTexts]:
    """The pieces between the cuts, in packed order, as views; a piece without a text holds the row's first text instead."""
    lengths = [length for n, length in texts.runs for _ in range(n)]
    starts = [0, *np.cumsum(lengths).tolist()]
    pieces = []
    for first, last in pairwise(bounds):
        if first == last:
            first, last = 0, 1
        row = slice(starts[first], starts[last])
        pieces.append(
            PackedTexts(
                ids_T=texts.ids_T[row],
                positions_T=texts.positions_T[row],
                cu_seqlens=texts.cu_seqlens[first : last + 1] - starts[first],
                place_N=torch.arange(last - first, device=texts.ids_T.device),
                runs=runs_of(lengths[first:last]),
            )
        )
    return pieces


def choose_group(positives: int, negatives: int, group_size: int, *key: int) -> tuple[int, np.ndarray]:
    """Which positive and which negatives (indices) one visit of a group takes; pure in `key` = (seed, epoch, row).

    One positive uniformly; group_size - 1 negatives without replacement, from the list repeated as often as needed when
    it is shorter. A group without negatives gives none: the other texts of the batch serve.
    """
    positive = int(mix64(*key, 1) % np.uint64(positives))
    wanted = group_size - 1
    if wanted == 0 or negatives == 0:
        return positive, np.empty(0, np.int64)
    repeats = -(-wanted // negatives)
    rank = np.argsort(mix64(*key, 2, np.arange(repeats * negatives)), kind="stable")
    return positive, rank[:wanted] % negatives


def collate_groups(
    shards, epochs_B, rows_B, *, seed: int, group_size: int, query_max_len: int, passage_max_len: int,
    own_only_spans: tuple[tuple[int, int], ...] = (), distill: bool = False,
) -> ContrastiveBatch:  # fmt: skip
    """A `ContrastiveBatch` of the groups `rows_B` as visited in `epochs_B`.

    own_only_spans: (first row, end row) of the sets that take no in-batch negatives. distill: with the teacher's scores.
    """
    suffix = len(shards.manifest["tokenizer"]["suffix_ids"])
    queries, passages, known, known_query = [], [], [], []
    own_BG = np.full((len(rows_B), group_size), -1, np.int64)
    teacher_BG = np.zeros((len(rows_B), group_size), np.float32) if distill else None
    for b, (epoch, row) in enumerate(zip(epochs_B.tolist(), rows_B.tolist(), strict=True)):
        group = shards.group(row)
        positive, negatives = choose_group(len(group.pos), len(group.neg), group_size, seed, epoch, row)
        queries.append(cut(group.query, query_max_len, suffix))
        own_BG[b, : 1 + len(negatives)] = len(passages) + np.arange(1 + len(negatives))
        passages.append(int(group.pos[positive]))
        passages.extend(group.neg[negatives].tolist())
        known.append(group.pos)
        known_query.append(np.full(len(group.pos), b))
        if distill:
            teacher_BG[b] = [group.pos_scores[positive], *group.neg_scores[negatives]]
    passages = np.asarray(passages, np.int64)
    texts, _ = pack(queries + [cut(shards.passage(int(p)), passage_max_len, suffix) for p in passages])
    own_only_B = np.zeros(len(rows_B), bool)
    for start, end in own_only_spans:
        own_only_B |= (rows_B >= start) & (rows_B < end)
    return ContrastiveBatch(
        texts=texts,
        queries=len(queries),
        own_BG=torch.from_numpy(own_BG),
        hashes_P=torch.from_numpy(shards.hashes(passages).view(np.int64)),
        known_K=torch.from_numpy(shards.hashes(np.concatenate(known)).view(np.int64)),
        known_query_K=torch.from_numpy(np.concatenate(known_query)),
        own_only_B=torch.from_numpy(own_only_B),
        rows_B=torch.from_numpy(rows_B),
        teacher_BG=None if teacher_BG is None else torch.from_numpy(teacher_BG),
    )


def collate_texts(shards, epochs_N, rows_N, *, seed: int, max_seq_length: int) -> PretrainBatch:
    """A `PretrainBatch` of the texts `rows_N` as visited in `epochs_N`."""
    suffix = len(shards.manifest["tokenizer"]["suffix_ids"])
    rows = rows_N.tolist()
    texts, order = pack([cut(shards.ids(row), max_seq_length, suffix) for row in rows])
    words = [cut(shards.words(rows[i]), max_seq_length, suffix) for i in order]
    return PretrainBatch(
        texts=texts,
        words_T=torch.from_numpy(np.concatenate(words).astype(np.int64)),
        keys_N=torch.from_numpy(mix64(seed, epochs_N, rows_N)[order].view(np.int64)),
        rows_N=torch.from_numpy(rows_N[order]),
    )
