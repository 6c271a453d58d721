"""Ranking by words alone (BM25, by the library bm25s), and together with vectors.

Shapes: Q queries, K candidates a query, D features.

The hybrid score of a passage is the inner product of the vectors plus WEIGHT times the BM25 score over the query's best BM25
score: a convex combination of scores keeps what a fusion of ranks throws away (Bruch et al., arXiv:2210.11934).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch

K1, B = 0.9, 0.4  # of BEIR's own baseline
# A Chinese or Japanese character is a word; elsewhere letters and digits in a row are one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_PAIRS = 1 << 16  # candidates scored at a time


def words(text: str) -> list[str]:
    """Lower-case words; a plural's s is dropped, the one bit of grammar that costs nothing."""
    found = _WORD.findall(text.lower())
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in found]


class Candidates:
    """The best passages of each query by BM25. rows_QK, scores_QK: best first; a score of 0 is no candidate."""

    def __init__(self, passages: Iterable[str], queries: list[str], kept: int):
        import bm25s

        index = bm25s.BM25(k1=K1, b=B)
        tokens = [words(text) for text in passages]
        index.index(tokens, show_progress=False)
        self.rows_QK = np.zeros((len(queries), min(kept, len(tokens))), np.int64)
        self.scores_QK = np.zeros(self.rows_QK.shape, np.float32)
        for q, query in enumerate(queries):
            if known := [word for word in words(query) if word in index.vocab_dict]:
                scores_P = index.get_scores(known)
                best = np.argsort(-scores_P, kind="stable")[: self.rows_QK.shape[1]]  # equal scores by row
                self.rows_QK[q], self.scores_QK[q] = best, scores_P[best]
        self.products_QK = np.zeros(self.rows_QK.shape, np.float32)

    def seen(self, queries_QD: torch.Tensor, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The blocks of passages as they are, each after the candidates in it have been scored by vectors."""
        first = 0
        for block_PD in blocks:
            q, k = np.nonzero((self.rows_QK >= first) & (self.rows_QK < first + len(block_PD)) & (self.scores_QK > 0))
            for at in range(0, len(q), _PAIRS):
                some_q, some_k = q[at : at + _PAIRS], k[at : at + _PAIRS]
                rows = torch.from_numpy(self.rows_QK[some_q, some_k] - first).to(block_PD.device)
                left_ND = queries_QD[torch.from_numpy(some_q).to(queries_QD.device)].float()
                products_N = (left_ND * block_PD[rows].to(left_ND).float()).sum(1)
                self.products_QK[some_q, some_k] = products_N.cpu().numpy()
            yield block_PD
            first += len(block_PD)

    def ranked(self) -> list[dict[int, float]]:
        """Of each query, passage -> score by BM25 alone, best first."""
        pairs = zip(self.rows_QK, self.scores_QK, strict=True)
        return [dict(zip(rows[scores > 0].tolist(), scores[scores > 0].tolist(), strict=True)) for rows, scores in pairs]

    def fused(self, rows_QK: np.ndarray, products_QK: np.ndarray, weight: float) -> list[dict[int, float]]:
        """The same by both; equal scores by row. rows_QK, products_QK: the best by vectors."""
        found = []
        for q, (rows_K, products_K) in enumerate(zip(rows_QK, products_QK, strict=True)):
            scores = dict(zip(rows_K.tolist(), products_K.tolist(), strict=True))
            top = self.scores_QK[q].max(initial=0.0) or 1.0
            for row, score, product in zip(self.rows_QK[q].tolist(), self.scores_QK[q], self.products_QK[q], strict=True):
                if score > 0:
                    scores[row] = scores.get(row, float(product)) + weight * float(score) / float(top)
            found.append(dict(sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))))
        return found
