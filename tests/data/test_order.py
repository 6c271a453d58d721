"""The order of the rows: a permutation each epoch, the same global batches for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data.order import Order, mix64, permute


@given(size=st.integers(1, 5000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    """Every row once, whatever the size: else texts would be lost or doubled."""
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_looks_shuffled():
    """Neighbours end far apart, no place keeps a preference, and another key is another order."""
    n = 4000
    first, second = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 0.06
    assert 0.30 < np.abs(np.diff(first)).mean() / n < 0.37  # a third for a random order
    images = np.array([permute(np.array([0]), 10, key)[0] for key in range(5000)])
    assert np.bincount(images, minlength=10).min() > 400


def test_ten_thousand_million_rows_need_no_memory():
    """One step of a corpus of 1e10 rows is computed from its places alone."""
    epochs, rows = Order(0, ((0, 10**10),), 4096).step_rows(10**6)
    assert (epochs == 0).all() and len(np.unique(rows)) == 4096 and rows.max() > 9 * 10**9


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_are_laid_end_to_end(shuffle):
    """Over whole epochs every row is seen exactly once an epoch though batches straddle the border; epochs differ."""
    order = Order(3, ((0, 10), (10, 17)), 5, shuffle=shuffle)
    epochs, rows = (np.concatenate(parts) for parts in zip(*(order.step_rows(s) for s in range(17)), strict=True))
    for epoch in range(5):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(17))
    assert np.array_equal(rows[:17], rows[17:34]) != shuffle
    assert order.steps(3) == 11 and order.steps(3, drop_last=True) == 10
    assert order.steps(0.5) == 2


def test_any_number_of_ranks_cuts_the_same_batches():
    """1 rank with batch 8, 2 with 4, 4 with 1 and two accumulation steps see the same rows in the same step."""
    order = Order(1, ((0, 100),), 8)
    _, rows = order.step_rows(7)
    for world, accumulation in ((1, 1), (2, 1), (4, 2), (8, 1)):
        ranks = [order.micro_batches(7, accumulation, rank, world) for rank in range(world)]
        micro = [np.concatenate([ranks[r][a][1] for r in range(world)]) for a in range(accumulation)]
        assert np.array_equal(np.concatenate(micro), rows)


def test_subsample_of_each_file():
    """max_per_span draws the same rows of a longer file in every epoch, all of a shorter one, none twice."""
    order = Order(5, ((0, 100), (100, 103)), 1, max_per_span=10)
    assert len(order) == 13
    _, rows = order.rows_at(np.arange(26))
    assert set(rows[:13]) == set(rows[13:]) and len(set(rows[:13])) == 13
    assert {100, 101, 102} <= set(rows[:13].tolist())
    assert set(rows[:13].tolist()) != {*range(10), 100, 101, 102}


def test_mix64_depends_on_every_key():
    """No key is dropped and no two keys commute: (1, 2) is not (2, 1)."""
    values = {int(mix64(*k)) for k in ((1, 2), (2, 1), (1,), (1, 2, 0), (1, 0, 2), (-1, 2))}
    assert len(values) == 6
