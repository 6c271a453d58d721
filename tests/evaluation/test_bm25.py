"""BM25 and the hybrid of it with vectors, against the formulas and a search over all scores."""

from __future__ import annotations

import math

import numpy as np
import torch

from bge_ds.evaluation.bm25 import K1, B, Candidates, words

PASSAGES = ["red fox red", "brown dogs bark at night", "a fox and two dogs", "", "fox fox fox fox"]
QUERIES = ["Red foxes?", "dogs, foxes", "nothing of it"]


def by_formula(passage: str, query: str) -> float:
    """BM25 (Robertson and Zaragoza, 2009) with Lucene's logarithm, up to the constant factor k1 + 1."""
    texts = [words(text) for text in PASSAGES]
    mean, score = sum(map(len, texts)) / len(texts), 0.0
    for word in words(query):
        found = sum(word in text for text in texts)
        count = words(passage).count(word)
        idf = math.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        score += idf * count / (count + K1 * (1 - B + B * len(words(passage)) / mean))
    return score


def test_words():
    """Plurals lose their s; each Chinese character is a word, as there are no spaces to part them."""
    assert words("Red foxes? Classes of 2 dogs_2:") == ["red", "foxe", "classe", "of", "2", "dog", "2"]
    assert words("a 红狐狸 ok") == ["a", "红", "狐", "狸", "ok"]


def test_scores_are_those_of_the_formula():
    candidates = Candidates(PASSAGES, QUERIES, kept=3)
    for q, query in enumerate(QUERIES):
        wanted = np.array([by_formula(passage, query) for passage in PASSAGES])
        order = [row for row in np.argsort(-wanted, kind="stable").tolist() if wanted[row] > 0][:3]
        found = candidates.ranked()[q]
        assert list(found) == order
        assert np.allclose(list(found.values()), wanted[order], atol=1e-5)


def test_the_hybrid_is_that_of_all_scores():
    """Also for a passage that the vectors alone would not have kept: its product is taken while its block passes by."""
    generator = torch.Generator().manual_seed(0)
    queries_QD, passages_PD = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    candidates = Candidates(PASSAGES, QUERIES, kept=5)
    blocks = list(candidates.seen(queries_QD, passages_PD.split(2)))
    assert torch.equal(torch.cat(blocks), passages_PD)
    products_QP = (queries_QD @ passages_PD.T).numpy()
    kept_Q2 = np.argsort(-products_QP, axis=1, kind="stable")[:, :2]
    found = candidates.fused(kept_Q2, np.take_along_axis(products_QP, kept_Q2, 1), weight=3.0)
    for q, query in enumerate(QUERIES):
        lexical = np.array([by_formula(passage, query) for passage in PASSAGES])
        wanted = products_QP[q] + 3.0 * lexical / (lexical.max() or 1)
        rows = sorted({*kept_Q2[q].tolist(), *np.flatnonzero(lexical).tolist()}, key=lambda row: (-wanted[row], row))
        assert list(found[q]) == rows
        assert np.allclose(list(found[q].values()), wanted[rows], atol=1e-5)
