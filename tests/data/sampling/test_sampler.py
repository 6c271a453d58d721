"""The order of the rows: a permutation each epoch, the same global batches for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data.sampling.sampler import EpochSampler, mix64, permute

pytestmark = pytest.mark.core


@given(size=st.integers(1, 10_000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    """Every row once, whatever the size: else texts would be lost or doubled."""
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_is_a_permutation_of_every_small_size():
    """Sizes around the powers of 4, where the network's domain changes, are all among them."""
    for size in range(1, 300):
        assert np.array_equal(np.sort(permute(np.arange(size), size, 9, size)), np.arange(size))


@given(size=st.integers(10_001, 10**12), key=st.integers(0, 2**63), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permute_of_a_large_size_takes_no_row_twice(size, key, data):
    """No two places of a stretch anywhere have the same row, and every row is one of the size's."""
    first = data.draw(st.integers(0, size - 2000))
    rows = permute(np.arange(first, first + 2000), size, key)
    assert len(np.unique(rows)) == 2000 and rows.min() >= 0 and rows.max() < size


def test_one_key_for_all_places_and_a_key_each_agree():
    """The round keys of a single permutation are hashed once: the rows must be those of the general way."""
    places = np.arange(500)
    keys = np.arange(500) % 3
    mixed = permute(places, 500, 1, keys)
    for key in range(3):
        assert np.array_equal(permute(places, 500, 1, np.full(500, key))[keys == key], mixed[keys == key])
        assert np.array_equal(permute(places, 500, 1, key), permute(places, 500, 1, np.full(500, key)))


def test_the_order_of_earlier_versions_is_kept():
    """A run that an earlier version began goes on with the same rows: the arithmetic must never change."""
    order = EpochSampler(3, ((0, 100), (100, 103), (103, 900)), 8, max_per_span=20)
    assert order.step_rows(5)[1].tolist() == [87, 94, 64, 642, 38, 560, 42, 873]


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
    epochs, rows = EpochSampler(0, ((0, 10**10),), 4096).step_rows(10**6)
    assert (epochs == 0).all() and len(np.unique(rows)) == 4096 and rows.max() > 9 * 10**9


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_are_laid_end_to_end(shuffle):
    """Over whole epochs every row is seen exactly once an epoch though batches straddle the border; epochs differ."""
    order = EpochSampler(3, ((0, 10), (10, 17)), 5, shuffle=shuffle)
    epochs, rows = (np.concatenate(parts) for parts in zip(*(order.step_rows(s) for s in range(17)), strict=True))
    for epoch in range(5):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(17))
    assert np.array_equal(rows[:17], rows[17:34]) != shuffle
    assert order.steps(3) == 11 and order.steps(3, drop_last=True) == 10
    assert order.steps(0.5) == 2


def test_any_number_of_ranks_cuts_the_same_batches():
    """1 rank with batch 8, 2 with 4, 4 with 1 and two accumulation steps see the same rows in the same step."""
    order = EpochSampler(1, ((0, 100),), 8)
    _, rows = order.step_rows(7)
    for world, accumulation in ((1, 1), (2, 1), (4, 2), (8, 1)):
        ranks = [order.micro_batches(7, accumulation, rank, world) for rank in range(world)]
        micro = [np.concatenate([ranks[r][a][1] for r in range(world)]) for a in range(accumulation)]
        assert np.array_equal(np.concatenate(micro), rows)


def test_subsample_of_each_file():
    """max_per_span draws the same rows of a longer file in every epoch, all of a shorter one, none twice."""
    order = EpochSampler(5, ((0, 100), (100, 103)), 1, max_per_span=10)
    assert len(order) == 13
    _, rows = order.rows_at(np.arange(26))
    assert set(rows[:13]) == set(rows[13:]) and len(set(rows[:13])) == 13
    assert {100, 101, 102} <= set(rows[:13].tolist())
    assert set(rows[:13].tolist()) != {*range(10), 100, 101, 102}


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    batch=st.sampled_from([8, 16, 24]),
    most=st.none() | st.integers(1, 30),
    step=st.integers(0, 300),
)
@settings(max_examples=60, deadline=None)
def test_1_2_4_and_8_ranks_see_equal_global_batches(sizes, batch, most, step):
    """Rank slices cut the same line, whatever the files and wherever the run is: a resumed run may change its ranks."""
    ends = np.cumsum(sizes).tolist()
    order = EpochSampler(11, tuple(zip([0, *ends], ends, strict=False)), batch, most)
    expected = order.step_rows(step)
    for world in (1, 2, 4, 8):
        parts = [order.micro_batches(step, 1, rank, world)[0] for rank in range(world)]
        for found, wanted in zip(zip(*parts, strict=True), expected, strict=True):
            assert np.array_equal(np.concatenate(found), wanted)


def test_mix64_depends_on_every_key():
    """No key is dropped and no two keys commute: (1, 2) is not (2, 1)."""
    values = {int(mix64(*k)) for k in ((1, 2), (2, 1), (1,), (1, 2, 0), (1, 0, 2), (-1, 2))}
    assert len(values) == 6
