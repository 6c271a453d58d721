"""From rows to a batch: which texts of a group are taken, and all texts of a batch packed in one row.

Shapes: T tokens of all texts, N texts, B queries, P passages of one rank's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from bge_ds.data.pairs import PairLayout
from bge_ds.data.ragged import RaggedArrays
from bge_ds.data.sampling.sampler import mix64
from bge_ds.kernels import masks
from bge_ds.kernels.packed import Movable, PackedPairs, PackedTexts, chunk_bounds, lay_out, split_further


class Share(NamedTuple):
    """What a rank brings to a micro batch: pieces that its texts are cut into, passages, hashes in its table of positives."""

    pieces: int
    passages: int
    known: int


@dataclass
class ContrastiveBatch(Movable):
    """Queries and passages of B groups: `texts` holds the B queries first, then the P passages group by group.

    own_BG: int64, the places of each query's group among the P passages, its positive first, -1 where a group is shorter.
    hashes_P: int64, content hash of each passage. known_BK: the hashes of every positive that a query lists, drawn or not,
    which must never serve as its negative; K is the longest list's length, and shorter ones repeat their last.
    own_only_B: bool, queries of a set that takes no in-batch negatives. teacher_BG: fp32, the teacher's scores, or None;
    taught_B: bool, the groups that have such, None for all; zeros stand in place of the others'.
    bounds: where this rank by itself cuts the row of texts into pieces, [0, ..., B + P]; None for one piece.
    """

    texts: PackedTexts
    queries: int
    own_BG: torch.Tensor
    hashes_P: torch.Tensor
    known_BK: torch.Tensor
    own_only_B: torch.Tensor
    rows_B: torch.Tensor
    teacher_BG: torch.Tensor | None = None
    taught_B: torch.Tensor | None = None
    bounds: list[int] | None = None

    @property
    def share(self) -> Share:
        return Share(1 if self.bounds is None else len(self.bounds) - 1, len(self.hashes_P), self.known_BK.shape[1])

    def cut_into(self, pieces: int) -> list[int]:
        """`bounds` of as many pieces, which are this rank's own number or more."""
        return split_further(self.bounds or [0, self.texts.place_N.numel()], pieces)

    def decodable(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """(row of its group in the training data, role, token ids) of each text: the queries, then the passages."""
        ids, owner = self.texts.split_ids(), {}
        for query, group in enumerate(self.own_BG.tolist()):
            owner |= {passage: query for passage in group if passage >= 0}
        rows = self.rows_B.tolist()
        for text, place in enumerate(self.texts.place_N.tolist()):
            if text < self.queries:
                yield rows[text], "query", ids[place]
            else:
                yield rows[owner[text - self.queries]], "passage", ids[place]


@dataclass
class PairBatch(Movable):
    """The pairs of B groups of one size G, group by group, the positive first.

    teacher_BG: fp32, the teacher's scores, or None. bounds: where this rank by itself cuts the row of pairs into pieces,
    [0, ..., B * G].
    """

    pairs: PackedPairs
    rows_B: torch.Tensor
    teacher_BG: torch.Tensor | None
    bounds: list[int]

    @property
    def texts(self) -> PackedTexts:
        return self.pairs.texts

    def decodable(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """(row of its group in the training data, role, token ids) of each pair, group by group."""
        ids, rows = self.texts.split_ids(), self.rows_B.tolist()
        group = len(ids) // len(rows)
        yield from ((rows[k // group], "pair", ids[place]) for k, place in enumerate(self.texts.place_N.tolist()))


@dataclass
class PretrainBatch(Movable):
    """N texts with the word of each token, and a key a text from which every mask is computed.

    words_T: int64 word number of each token in its text. keys_N: int64, hash of (seed, epoch, row), in packed order.
    masked_M: int64, the tokens of the row that the encoder must predict, rising. They are chosen on the host, where the batch
    is built: shapes depend on how many there are, and reading that number back from a GPU would stall the step.
    """

    texts: PackedTexts
    words_T: torch.Tensor
    keys_N: torch.Tensor
    rows_N: torch.Tensor
    masked_M: torch.Tensor

    @property
    def targets(self) -> tuple[int, int, int]:
        """How many masked tokens, inner tokens (all but the first and last of a text), and texts with an inner token."""
        runs = self.texts.runs
        inner = sum(n * max(0, length - 2) for n, length in runs)
        return self.masked_M.numel(), inner, sum(n for n, length in runs if length > 2)

    def decodable(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """(row of the training data, role, token ids) of each text, in packed order."""
        yield from ((int(row), "text", ids) for row, ids in zip(self.rows_N.tolist(), self.texts.split_ids(), strict=True))


def pack_ragged(texts: RaggedArrays) -> tuple[PackedTexts, np.ndarray]:
    """As `kernels.packed.pack`, of arrays that lie end to end already."""
    order = np.argsort(texts.lengths, kind="stable")
    row = texts.take(order)
    return lay_out(row.values, row.lengths, order), order


def choose_groups(
    positives_B: np.ndarray, negatives_B: np.ndarray, group_size: int, seed: int, epochs_B: np.ndarray, rows_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which positive and which negatives the visit of each group takes; pure in (seed, epoch, row) of the group.

    positives_B, negatives_B: texts that each group lists. Returns indices into these lists, int64: chosen_B, one positive
    uniformly, and chosen_BN, N = group_size - 1 negatives without replacement, from the list repeated as often as needed
    when it is shorter. A group without negatives gives none, -1 in its place: the other texts of the batch serve.
    """
    groups, wanted = len(rows_B), group_size - 1
    chosen_B = (mix64(seed, epochs_B, rows_B, 1) % positives_B.astype(np.uint64)).astype(np.int64)
    chosen_BN = np.full((groups, wanted), -1, np.int64)
    some = negatives_B > 0
    if wanted and some.any():
        listed = np.where(some, -(-wanted // np.maximum(negatives_B, 1)) * negatives_B, 0)
        starts_B = np.cumsum(listed) - listed
        group_K = np.repeat(np.arange(groups), listed)  # K: the repeated lists of all groups, end to end
        index_K = np.arange(len(group_K)) - starts_B[group_K]
        drawn_K = np.lexsort((mix64(seed, epochs_B[group_K], rows_B[group_K], 2, index_K), group_K))
        first_BN = index_K[drawn_K[starts_B[some][:, None] + np.arange(wanted)]]
        chosen_BN[some] = first_BN % negatives_B[some][:, None]
    return chosen_B, chosen_BN


SHORT_TYPES = ("only_1neg", "symmetric_class")  # types of lines whose groups may be shorter than the others


def shorten(chosen_BN: np.ndarray, negatives_B: np.ndarray, types_B: list[str | None]) -> np.ndarray:
    """The negatives that groups take by the `type` of their lines: one of only_1neg, each at most once of symmetric_class.

    chosen_BN, negatives_B: of `choose_groups`.
    """
    chosen_BN = chosen_BN.copy()
    for group, kind in enumerate(types_B):
        listed = int(negatives_B[group])
        if kind == "only_1neg":
            chosen_BN[group, 1:] = -1
        elif kind == "symmetric_class" and listed < chosen_BN.shape[1]:
            chosen_BN[group] = np.where(np.arange(chosen_BN.shape[1]) < listed, np.arange(chosen_BN.shape[1]), -1)
    return chosen_BN


def collate_groups(
    shards, epochs_B, rows_B, *, seed: int, group_size: int, query_max_len: int, passage_max_len: int,
    own_only_spans: tuple[tuple[int, int], ...] = (), by_type: bool = False, distill: bool = False,
    max_texts: int | None = None, max_tokens: int | None = None,
) -> ContrastiveBatch:  # fmt: skip
    """A `ContrastiveBatch` of the groups `rows_B` as visited in `epochs_B`.

    own_only_spans: (first row, end row) of the sets that take no in-batch negatives. by_type: see `shorten`. distill: with the
    teacher's scores. max_texts, max_tokens: of a piece; both None for one piece.
    """
    suffix = len(shards.manifest.tokenizer.suffix_ids)
    pos, neg = shards.passage_rows(rows_B)
    chosen = choose_groups(pos.lengths, neg.lengths, group_size, seed, epochs_B, rows_B)
    if by_type:
        chosen = chosen[0], shorten(chosen[1], neg.lengths, [shards.notes(row)[0] for row in rows_B.tolist()])
    taken_BG = np.concatenate([chosen[0][:, None], chosen[1]], 1) >= 0
    own_BG = np.where(taken_BG, (np.cumsum(taken_BG) - 1).reshape(taken_BG.shape), -1)
    passages_P = _taken(pos, neg, chosen)[taken_BG]
    teacher_BG, taught_B = _teacher(shards.scores(rows_B), neg.lengths, chosen) if distill else (None, None)
    passages = shards.passages(passages_P).cut(passage_max_len, suffix)
    texts, _ = pack_ragged(RaggedArrays.join([shards.queries(rows_B).cut(query_max_len, suffix), passages]))
    hashes = shards.hashes(np.concatenate([passages_P, pos.values])).view(np.int64)
    known_BK = pos.starts[:, None] + np.minimum(np.arange(pos.lengths.max()), pos.lengths[:, None] - 1)
    own_only_B = np.zeros(len(rows_B), bool)
    for start, end in own_only_spans:
        own_only_B |= (rows_B >= start) & (rows_B < end)
    return ContrastiveBatch(
        texts=texts,
        queries=len(rows_B),
        own_BG=torch.from_numpy(own_BG),
        hashes_P=torch.from_numpy(hashes[: len(passages_P)]),
        known_BK=torch.from_numpy(hashes[len(passages_P) + known_BK]),
        own_only_B=torch.from_numpy(own_only_B),
        rows_B=torch.from_numpy(rows_B),
        teacher_BG=teacher_BG,
        taught_B=taught_B,
        bounds=chunk_bounds(texts.runs, max_texts, max_tokens) if max_texts or max_tokens else None,
    )


def collate_pairs(
    shards, epochs_B, rows_B, *, seed: int, group_size: int, layout: PairLayout, cuts: dict[str, int], distill: bool = False,
    max_texts: int | None = None, max_tokens: int | None = None,
) -> PairBatch:  # fmt: skip
    """A `PairBatch` of the groups `rows_B`, which all have negatives, as visited in `epochs_B`.

    cuts: lengths that `layout.build` takes. The other arguments are those of `collate_groups`.
    """
    pos, neg = shards.passage_rows(rows_B)
    chosen = choose_groups(pos.lengths, neg.lengths, group_size, seed, epochs_B, rows_B)
    teacher_BG = None
    if distill:
        teacher_BG = torch.from_numpy(_taken(*shards.scores(rows_B), chosen).astype(np.float32))
    special = shards.manifest.tokenizer
    queries, passages = (
        texts.inner(len(special.prefix_ids), len(special.suffix_ids))
        for texts in (shards.queries(rows_B), shards.passages(_taken(pos, neg, chosen).ravel()))
    )
    made = layout.build(queries.take(np.repeat(np.arange(len(rows_B)), group_size)), passages, **cuts)
    texts, order = pack_ragged(made.ids)
    second_N = None if made.second is None else torch.from_numpy(made.second[order].astype(np.int64))
    bounds = chunk_bounds(texts.runs, max_texts, max_tokens)
    return PairBatch(PackedPairs(texts, second_N), torch.from_numpy(rows_B), teacher_BG, bounds)


def _teacher(
    scores: tuple[RaggedArrays, RaggedArrays], negatives_B: np.ndarray, chosen: tuple[np.ndarray, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`teacher_BG` and `taught_B` of a batch. negatives_B: texts that each group lists."""
    pos, neg = scores
    taught_B = (pos.lengths > 0) & (neg.lengths == negatives_B)
    teacher_BG = np.zeros((len(taught_B), 1 + chosen[1].shape[1]), np.float32)
    rows = np.flatnonzero(taught_B)
    teacher_BG[rows] = _taken(pos.take(rows), neg.take(rows), (chosen[0][rows], chosen[1][rows]))
    return torch.from_numpy(teacher_BG), None if taught_B.all() else torch.from_numpy(taught_B)


def _taken(pos: RaggedArrays, neg: RaggedArrays, chosen: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What is listed for the texts that `choose_groups` chose, shape (B, G), the positive first, 0 where there is none."""
    chosen_B, chosen_BN = chosen
    taken_BG = np.zeros((len(chosen_B), 1 + chosen_BN.shape[1]), pos.values.dtype)
    taken_BG[:, 0] = pos.at(np.arange(len(chosen_B)), chosen_B)
    group_K, place_K = np.nonzero(chosen_BN >= 0)
    taken_BG[group_K, 1 + place_K] = neg.at(group_K, chosen_BN[group_K, place_K])
    return taken_BG


def collate_texts(shards, epochs_N, rows_N, *, seed: int, max_seq_length: int, encoder_share: float) -> PretrainBatch:
    """A `PretrainBatch` of the texts `rows_N` as visited in `epochs_N`. encoder_share: of the words masked."""
    suffix = len(shards.manifest.tokenizer.suffix_ids)
    ids, words = (part.cut(max_seq_length, suffix) for part in shards.texts(rows_N))
    texts, order = pack_ragged(ids)
    words_T = torch.from_numpy(words.take(order).values.astype(np.int64))
    keys_N = torch.from_numpy(mix64(seed, epochs_N, rows_N)[order].view(np.int64))
    masked_M = choose_masked(texts, words_T, keys_N, encoder_share)
    return PretrainBatch(texts, words_T, keys_N, torch.from_numpy(rows_N[order]), masked_M)


def choose_masked(texts: PackedTexts, words_T: torch.Tensor, keys_N: torch.Tensor, share: float) -> torch.Tensor:
    """The tokens (int64, rising) of the words masked for the encoder: a share of them, first and last token excepted."""
    inner_T = torch.ones_like(words_T, dtype=torch.bool)
    ends = texts.cu_seqlens.long()
    inner_T[ends[:-1]] = False
    inner_T[ends[1:] - 1] = False
    key_T = keys_N.repeat_interleave(texts.cu_seqlens.diff())
    return masks.encoder_masked(key_T, words_T, inner_T, share).nonzero()[:, 0]
