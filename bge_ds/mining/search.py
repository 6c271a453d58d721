"""The best passages of queries: exactly, in tiles, or by an index of faiss whose recall is measured.

Shapes: Q queries, K kept passages a query, P passages of one block, D features.

The exact search holds a block of queries with their K best passages and one block of passages, which is read from the disk
(`evaluation/retrieval.py`); so memory does not grow with the passages. Equal scores are in the order of the passages.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_ds.data.files import PARTIAL
from bge_ds.encoding.vectors import Vectors
from bge_ds.evaluation import retrieval

TILE = retrieval.TILE
SAMPLE = 256  # queries that a recall is measured on
_TRAINED = 40  # vectors a list of the index that the lists are found from; faiss warns below 39
_PAIRS = 8192  # products of a query and a passage computed at a time


class ExactSearch:
    """The `kept` best of the first `pool` passages, on `device`, `tile` queries at a time."""

    def __init__(self, passages: Vectors, pool: int, kept: int, device: torch.device, tile: int = TILE) -> None:
        self.passages, self.pool, self.kept, self.device, self.tile = passages, pool, kept, device, tile

    def __call__(self, queries_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores float64, rows of passages), Q x K, best first; K is fewer where there are fewer passages."""
        blocks = ((first, torch.from_numpy(np.array(block_PD))) for first, block_PD in pool_blocks(self.passages, self.pool))
        queries = torch.from_numpy(queries_QD).to(self.device)
        scores_QK, rows_QK = retrieval.from_keys(retrieval.best_keys(queries, blocks, self.kept, self.tile))
        return scores_QK.cpu().numpy().astype(np.float64), rows_QK.cpu().numpy()


class FaissSearch:
    """The same by an inverted file of faiss, which misses some of the best passages."""

    def __init__(self, index: Any, kept: int) -> None:
        self.index, self.kept = index, kept

    def __call__(self, queries_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ExactSearch; -1 stands for a passage that was not found."""
        scores_QK, rows_QK = self.index.search(queries_QD, self.kept)
        order_QK = np.lexsort((rows_QK, -scores_QK))
        scores_QK, rows_QK = (np.take_along_axis(held_QK, order_QK, axis=1) for held_QK in (scores_QK, rows_QK))
        return scores_QK.astype(np.float64), rows_QK


def recall(search: FaissSearch, exact: ExactSearch, queries: Vectors) -> float:
    """The share of the best passages that a search finds, over SAMPLE queries from all over the input.

    Passages that score as the last of the best, up to rounding, are as good as that.
    """
    sample_QD = queries[np.unique(np.linspace(0, len(queries) - 1, SAMPLE).astype(np.int64))]
    found_QK, best_QK = search(sample_QD)[0], exact(sample_QD)[0]
    last_Q1 = best_QK[:, -1:]
    return float((found_QK[:, : best_QK.shape[1]] >= last_Q1 - 1e-6 * np.abs(last_Q1)).mean())


def load_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ValueError("--index faiss needs faiss: pip install faiss-cpu, or take the exact index") from None


def build_index(path: Path, passages: Vectors, pool: int) -> None:
    """Writes an inverted file of the pool's vectors as they are: about 4 sqrt(pool) lists, found by k-means on a sample."""
    faiss = load_faiss()
    lists = max(1, min(int(4 * pool**0.5), pool // _TRAINED))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(passages.shape[1]), passages.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.train(passages[np.linspace(0, pool - 1, min(pool, lists * _TRAINED)).astype(np.int64)])
    for _, block_PD in pool_blocks(passages, pool):
        index.add(np.ascontiguousarray(block_PD))
    partial = path.with_name(path.name + PARTIAL)
    faiss.write_index(index, str(partial))
    partial.replace(path)


def open_index(path: Path, probes: int | None) -> Any:
    """The index, mapped. probes: lists searched for each query; None: an eighth of them, at least 8."""
    faiss = load_faiss()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index.nprobe = min(index.nlist, probes or max(8, index.nlist // 8))
    return index


def pool_blocks(passages: Vectors, pool: int) -> Iterator[tuple[int, np.ndarray]]:
    """(row of the first, P x D float32) of the first `pool` passages."""
    for first, block_PD in passages.blocks():
        if first >= pool:
            return
        yield first, block_PD[: pool - first]


def products(queries_KD: np.ndarray, passages: Vectors, rows_K: np.ndarray) -> np.ndarray:
    """The inner product of each query with its passage, float64. queries_KD: K x D, or 1 x D for one query."""
    found_K = np.empty(len(rows_K))
    for at in range(0, len(rows_K), _PAIRS):
        own_KD = queries_KD if len(queries_KD) == 1 else queries_KD[at : at + _PAIRS]
        found_K[at : at + _PAIRS] = (passages[rows_K[at : at + _PAIRS]].astype(np.float64) * own_KD).sum(axis=1)
    return found_K
