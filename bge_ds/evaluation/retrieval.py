"""Exact search and retrieval measures.

Shapes: Q queries, P passages of one block, K kept passages a query, D features.

Every query is scored against every passage by inner product. A candidate is one int64 key: the score in the upper half, the
passage's row in the lower. Keys are ordered by score and, among equal scores, by row, so one `topk` keeps the best, breaks
ties and merges blocks and ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import ir_measures
import numpy as np
import torch
from tqdm import tqdm

from bge_ds.data.beir import RetrievalSet
from bge_ds.data.ragged import RaggedArrays
from bge_ds.evaluation.bm25 import Candidates

MEASURES = (ir_measures.nDCG @ 10, ir_measures.RR @ 10, ir_measures.R @ 100)
NAMES = ("nDCG@10", "MRR@10", "Recall@100")
VECTORS = "vectors"
KEPT = 100  # the deepest cutoff among the measures
BLOCK = 16384  # passages encoded and searched at a time
TILE = 512  # queries scored against a block at a time: 32 MiB of fp32 scores, 64 MiB of keys
_FEW = 1 / 16  # of a block's scores, above which all are sorted
_ROW = (1 << 32) - 1  # the lower half of a key is this minus the row, so that the lower row has the larger key
_TOKENIZED = 512  # texts handed to the tokenizer at a time
NO_KEY = torch.iinfo(torch.int64).min  # below the key of every passage


def keys_of(scores_QP: torch.Tensor, rows_P: torch.Tensor) -> torch.Tensor:
    """The keys of passages with these rows. NaN counts as the lowest score."""
    # + 0.0 turns -0.0 into 0.0. The bits of positive floats are in order as integers; those of negative ones are inverted.
    scores_QP = torch.nan_to_num(scores_QP, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    bits_QP = scores_QP.view(torch.int32)
    bits_QP = bits_QP ^ ((bits_QP >> 31) & 0x7FFFFFFF)
    return (bits_QP.long() << 32) + (_ROW - rows_P)


def from_keys(keys_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores fp32, rows int64) of keys."""
    bits_QK = (keys_QK >> 32).to(torch.int32)
    scores_QK = (bits_QK ^ ((bits_QK >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores_QK, _ROW - (keys_QK & _ROW)


def best_of(keys_QP: torch.Tensor, kept: int) -> torch.Tensor:
    return keys_QP.topk(min(kept, keys_QP.shape[1]), dim=1).values


def best_keys(
    queries_QD: torch.Tensor, blocks: Iterable[tuple[int, torch.Tensor]], kept: int = KEPT, tile: int = TILE
) -> torch.Tensor:
    """Keys of the `kept` best passages of each query (fewer where there are fewer), best first.

    blocks: (row of the first passage, P x D); each is released once it is searched. tile: queries scored at a time.
    """
    best_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for first_row, block_PD in blocks:
        block_PD = block_PD.to(queries_QD.device)
        rows_P = torch.arange(first_row, first_row + len(block_PD), device=queries_QD.device)
        with _exact_products():
            best_QK = torch.cat([
                _merged(best, tile_QD @ block_PD.T, rows_P, kept)
                for tile_QD, best in zip(queries_QD.split(tile), best_QK.split(tile), strict=True)
            ])  # fmt: skip
    return best_QK


def _merged(best_QK: torch.Tensor, scores_QP: torch.Tensor, rows_P: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` best of the keys so far and of a block's scores.

    Once there are enough keys, few scores of a block reach the last of them: on a CPU these alone are sorted.
    """
    if scores_QP.device.type == "cpu" and scores_QP.numel() and best_QK.shape[1] == kept:
        reaches_QP = scores_QP >= from_keys(best_QK[:, -1:])[0]
        counts_Q = reaches_QP.sum(1)
        most = int(counts_Q.max())
        if most <= _FEW * scores_QP.shape[1]:
            queries_H, columns_H = reaches_QP.nonzero(as_tuple=True)  # query by query
            places_H = torch.arange(len(queries_H)) - (counts_Q.cumsum(0) - counts_Q)[queries_H]
            keys_QH = best_QK.new_full((len(best_QK), most), NO_KEY)  # H: the scores that reach; here, of one query
            keys_QH[queries_H, places_H] = keys_of(scores_QP[queries_H, columns_H], rows_P[columns_H])
            return best_of(torch.cat([best_QK, keys_QH], dim=1), kept)
    return best_of(torch.cat([best_QK, keys_of(scores_QP, rows_P)], dim=1), kept)


@contextmanager
def _exact_products():
    """Scores are in fp32, whatever the layers are computed in: TensorFloat-32 would turn near scores into ties."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def search(queries_QD: torch.Tensor, blocks_PD: Iterable[torch.Tensor], kept: int = KEPT):
    """The `kept` best passages of each query over all blocks: (scores Q x K fp32, rows Q x K int64), best first.

    Rows are numbered through the blocks in the order given; equal scores are in the order of the rows.
    """

    def numbered() -> Iterator[tuple[int, torch.Tensor]]:
        row = 0
        for block_PD in blocks_PD:
            yield row, block_PD
            row += len(block_PD)

    return from_keys(best_keys(queries_QD, numbered(), kept))


def ranking(data: RetrievalSet, found_QK: Iterable[Iterable[int]]) -> dict[str, dict[str, float]]:
    """query id -> passage id -> score, from each query's best distinct texts (their indices, best first).

    The scores are ranks, negated, so that the measures do not reorder equal scores by passage id.
    """
    run = {}
    for query, found_K in zip(data.queries, found_QK, strict=True):
        rows = (row for index in found_K for row in (data.firsts[index], *data.copies.get(index, ())))
        run[query] = {data.passage_ids[row]: float(-place) for place, row in enumerate(islice(rows, KEPT))}
    return run


def measure(data: RetrievalSet, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """The measures of a ranking (query id -> passage id -> score), averaged over all queries of the set."""
    values = ir_measures.calc_aggregate(MEASURES, data.qrels, run)
    return {name: round(float(values[measure]), 6) for name, measure in zip(NAMES, MEASURES, strict=True)}


def tokenize(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of texts, cut at max_length; a text without tokens gets one, since it must have a vector."""
    if not texts:
        return []
    unused = {"return_attention_mask": False, "return_token_type_ids": False}
    ids = tokenizer(texts, truncation=True, max_length=max_length, **unused)["input_ids"]
    # The call leaves its truncation in the tokenizer, which would be saved with the model.
    tokenizer.backend_tokenizer.no_truncation()
    return [row or [tokenizer.eos_token_id or 0] for row in ids]


def tokenize_content(tokenizer, texts: list[str]) -> RaggedArrays:
    """int32 ids of texts, uncut and without special tokens."""
    parts = [RaggedArrays.of_lists([], np.int32)]
    for first in range(0, len(texts), _TOKENIZED):
        made = tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + _TOKENIZED], add_special_tokens=False)
        parts.append(RaggedArrays.of_lists([encoding.ids for encoding in made], np.int32))
    return RaggedArrays.join(parts)


def evaluate_set(data: RetrievalSet, encode: Callable[[list[str], str], torch.Tensor]) -> dict[str, float]:
    """The measures of a model on one set, with its sizes and seconds. encode(texts, "query" or "passage"): N x D, fp32."""
    return evaluate_with(data, encode, None)[VECTORS]


def evaluate_with(
    data: RetrievalSet, encode: Callable[[list[str], str], torch.Tensor], bm25: float | None
) -> dict[str, dict[str, float]]:
    """The same by kind of ranking: by vectors and, where `bm25` is a weight, by BM25 and by both (see `bm25.py`)."""
    started = time.perf_counter()
    found = rank_with(data, encode, bm25)
    sizes = sizes_of(data) | {"seconds": round(time.perf_counter() - started, 2)}
    return {kind: measure(data, ranking(data, found_Q)) | sizes for kind, found_Q in found.items()}


def sizes_of(data: RetrievalSet) -> dict[str, float]:
    """What stands beside the measures."""
    return {"queries": len(data.queries), "passages": len(data.passage_ids), "queries_left_out": data.unjudged}


def rank_with(
    data: RetrievalSet, encode: Callable[[list[str], str], torch.Tensor], bm25: float | None
) -> dict[str, list[dict[int, float]]]:
    """By kind of ranking: of each query, index of a distinct text -> score, best first; at most KEPT (of both, more)."""
    queries = list(data.queries.values())
    queries_QD = encode(queries, "query")
    by_words = None if bm25 is None else Candidates(data.distinct(), queries, KEPT)
    texts = data.distinct()
    with tqdm(total=len(data.firsts), desc=data.name, unit="passages", disable=None) as bar:

        def blocks() -> Iterator[torch.Tensor]:
            while block := list(islice(texts, BLOCK)):
                yield encode(block, "passage")
                bar.update(len(block))

        products_QK, found_QK = search(queries_QD, by_words.seen(queries_QD, blocks()) if by_words else blocks(), KEPT)
    scores = zip(found_QK.tolist(), products_QK.tolist(), strict=True)
    found = {VECTORS: [dict(zip(found_K, products_K, strict=True)) for found_K, products_K in scores]}
    if by_words and bm25 is not None:
        found |= {"BM25": by_words.ranked(), "hybrid": by_words.fused(found_QK.cpu().numpy(), products_QK.cpu().numpy(), bm25)}
    return found
