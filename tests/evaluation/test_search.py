"""Exact search over blocks against sorting all scores at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_ds.evaluation import retrieval


def reference(scores_QP: np.ndarray, kept: int) -> np.ndarray:
    """Rows of the best passages, equal scores in the order of the rows; NaN is the lowest score."""
    scores_QP = np.where(np.isnan(scores_QP), -np.inf, scores_QP)
    return np.stack([np.lexsort((np.arange(len(row)), -row))[:kept] for row in scores_QP])


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "hardly any", "not numbers"])
@pytest.mark.parametrize("block", [7, 64, 500])
@pytest.mark.parametrize("few", [1 / 16, 1.0])
def test_blocks_and_tiles_change_nothing(monkeypatch, kind, block, few):
    """Few of a later block's scores may reach the best, or all of them, or equal ones that must not win.

    few: 1.0: whatever their number, those alone are sorted.
    """
    monkeypatch.setattr(retrieval, "_FEW", few)
    rng = np.random.default_rng(0)
    # Whole numbers: products are exact, whatever the size of a block.
    passages, queries = ((100 * rng.standard_normal((n, 3))).round().astype(np.float32) for n in (500, 9))
    if kind == "ties":
        passages, queries = (passages / 100).round(), (queries / 100).round()
    elif kind == "rising":
        passages = np.sort(np.abs(passages), axis=0)
        queries = np.abs(queries)
    elif kind == "hardly any":
        passages[20:] = 0.0
    elif kind == "not numbers":
        passages[::11] = np.nan
        passages[5], passages[300] = np.inf, -np.inf
    pieces = [torch.from_numpy(passages[first : first + block]) for first in range(0, 500, block)]
    with np.errstate(invalid="ignore"):
        scores_QP = queries @ passages.T
    for tile, kept in ((4, 10), (512, 10), (512, 600)):
        numbered = ((block * k, piece) for k, piece in enumerate(pieces))
        keys_QK = retrieval.best_keys(torch.from_numpy(queries), numbered, kept, tile)
        found_QK, rows_QK = retrieval.from_keys(keys_QK)
        assert rows_QK.numpy().tolist() == reference(scores_QP, kept).tolist()
        expected = np.take_along_axis(scores_QP, rows_QK.numpy(), 1)
        np.testing.assert_array_equal(found_QK, np.where(np.isnan(expected), -np.inf, expected))


def test_no_query_finds_nothing():
    blocks = ((0, torch.ones(300, 3)), (300, torch.ones(300, 3)))
    assert retrieval.best_keys(torch.empty(0, 3), blocks, 10).shape == (0, 10)
