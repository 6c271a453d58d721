"""Mixtures: exact shares, each set walked once an epoch, any place found without those before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data.sampling.mixture import (
    CYCLE,
    ByEpoch,
    ByWeight,
    Cycle,
    MixtureSampler,
    SameDatasetBatchSampler,
    counts_of,
    floor_sums,
    golden_step,
)
from bge_ds.data.sampling.sampler import EpochSampler

pytestmark = pytest.mark.core

counts_and_offset = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
sizes_of_sets = st.lists(st.integers(1, 60), min_size=2, max_size=5)


def lines(sizes, batch, shuffle=True) -> tuple[EpochSampler, ...]:
    """Set i has rows 1000 i ... 1000 i + size - 1."""
    return tuple(EpochSampler(i, ((1000 * i, 1000 * i + size),), batch, shuffle=shuffle) for i, size in enumerate(sizes))


def by_epoch(sizes, batch, seed=0, shuffle=True) -> SameDatasetBatchSampler:
    return SameDatasetBatchSampler(seed, lines(sizes, batch, shuffle), ByEpoch(seed, tuple(sizes), batch, shuffle), batch)


@given(
    n=st.integers(0, 60), size=st.integers(1, 60), step=st.integers(0, 200),
    starts=st.lists(st.integers(-100, 100), min_size=1, max_size=4),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_floor_sums_equal_the_plain_sum(n, size, step, starts):
    """All counts of turns rest on it."""
    expected = [sum((t * step + start) // size for t in range(n)) for start in starts]
    assert floor_sums(n, size, step, np.array(starts)).tolist() == expected


@given(counts=counts_and_offset, offset=st.integers(0, 100), data=st.data())
@settings(max_examples=200, deadline=None)
def test_shares_are_exact_over_a_cycle_and_turns_follow_one_another(counts, offset, data):
    """Set i has counts[i] places of a cycle and its turns are 0, 1, 2 ...; a stretch is what the whole cycle says."""
    size = sum(counts)
    cycle = Cycle(tuple(counts), offset % size, golden_step(size))
    sets_K, turns_K = cycle.at(0, size)
    for i, count in enumerate(counts):
        assert np.array_equal(turns_K[sets_K == i], np.arange(count))
    first = data.draw(st.integers(0, size))
    sets_K[:first] = -1
    end = data.draw(st.integers(first, size))
    found = cycle.at(first, end)
    assert np.array_equal(found[0], sets_K[first:end]) and np.array_equal(found[1], turns_K[first:end])
    assert cycle.before(end).sum() == end


@given(counts=counts_and_offset, first=st.integers(0, 200), length=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_cycles_are_laid_end_to_end(counts, first, length):
    """A stretch over the borders of cycles goes on counting each set's turns: a text lost there would be lost for good."""
    shares = ByWeight(5, tuple(counts))
    sets_K, turns_K = shares.at(0, first + length)
    found = shares.at(first, first + length)
    assert np.array_equal(found[0], sets_K[first:]) and np.array_equal(found[1], turns_K[first:])
    for i in range(len(counts)):
        assert np.array_equal(turns_K[sets_K == i], np.arange((sets_K == i).sum()))
    assert shares.before(first).tolist() == np.bincount(sets_K[:first], minlength=len(counts)).tolist()


@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6), seed=st.integers(0, 2**32), first=st.integers(0, 10**12))
@settings(max_examples=30, deadline=None)
def test_any_stretch_has_the_shares_within_a_few_texts(weights, seed, first):
    """Not only a cycle of 2^30: whatever stretch of a run is looked at, no set is ahead or behind by more than a few."""
    shares = ByWeight(seed, counts_of(weights))
    assert sum(shares.counts) == CYCLE
    sets_K, _ = shares.at(first, first + 5000)
    for i, weight in enumerate(weights):
        ahead = np.cumsum(sets_K == i) - np.arange(1, 5001) * (weight / sum(weights))
        assert np.abs(ahead).max() < 8


def test_counts_are_the_nearest_whole_ones():
    assert counts_of([3, 1], 8) == (6, 2) and counts_of([1, 1, 1], 8) in {(3, 3, 2), (3, 2, 3), (2, 3, 3)}
    assert counts_of([1, 1e-12], 1000) == (1000, 0)


@given(sizes=sizes_of_sets, seed=st.integers(0, 99), step=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_each_set_of_a_mixture_is_its_own_line(sizes, seed, step):
    """Whatever the weights, a set's texts come as its own order has them: each once an epoch of the set, none left out."""
    sets = lines(sizes, 8)
    mixture = MixtureSampler(seed, sets, ByWeight(seed, counts_of([1 + i for i in range(len(sizes))])), 8)
    parts = [mixture.step_rows(s) for s in range(step + 1)]
    epochs, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    for i, line in enumerate(sets):
        here = rows // 1000 == i
        wanted = line.rows_at(np.arange(here.sum()))
        assert np.array_equal(rows[here], wanted[1]) and np.array_equal(epochs[here], wanted[0])
    assert mixture.texts_of_sets(len(rows)).tolist() == np.bincount(rows // 1000, minlength=len(sizes)).tolist()


@given(sizes=sizes_of_sets, batch=st.integers(1, 24), epochs=st.integers(1, 6), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_batches_of_one_set_walk_every_set_once_an_epoch(sizes, batch, epochs, shuffle):
    """A batch has rows of one set. In epoch e, set i has floor((e+1) N / G) - floor(e N / G) of them, its line's next ones."""
    order, taken = by_epoch(sizes, batch, shuffle=shuffle), [[] for _ in sizes]
    for epoch in range(epochs):
        for step in range(order.steps(epoch), order.steps(epoch + 1)):
            _, rows = order.step_rows(step)
            (i,) = set((rows // 1000).tolist())
            taken[i].append(rows)
        for i, size in enumerate(sizes):
            assert len(taken[i]) == (epoch + 1) * size // batch
    for line, batches in zip(order.sets, taken, strict=True):
        wanted = line.rows_at(np.arange(len(batches) * batch))[1]
        assert np.array_equal(np.concatenate([np.empty(0, int), *batches]), wanted)
    steps = order.steps(epochs)
    assert order.texts_of_sets(steps * batch).tolist() == [batch * len(batches) for batches in taken]
    if steps:
        assert order.filled_steps(order.epochs(steps)) == pytest.approx(steps)


def test_sets_follow_one_another_in_the_order_of_the_data():
    """Without shuffling, whole files come one after another, their rows in order."""
    order = by_epoch([16, 8, 24], 8, shuffle=False)
    rows = np.concatenate([order.step_rows(step)[1] for step in range(order.steps(1))])
    assert rows.tolist() == [*range(16), *range(1000, 1008), *range(2000, 2024)]


def test_sets_take_turns_evenly():
    """A shuffled run does not take one set's batches in one go; epochs differ."""
    order = by_epoch([800, 800], 8)
    first, second = ([int(order.step_rows(s)[1][0]) // 1000 for s in range(e * 200, (e + 1) * 200)] for e in (0, 1))
    assert max(abs(2 * sum(first[:n]) - n) for n in range(200)) <= 6
    assert first != second


@pytest.mark.parametrize("batches_of_one", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_1_2_4_and_8_ranks_see_equal_global_batches(batches_of_one, weighted):
    """The set of a batch, and all of its texts, are the same on any number of ranks, at any step, asked in any order."""
    sets = lines([50, 9, 70], 16)
    turns = ByWeight(3, counts_of([1, 2, 3])) if weighted or not batches_of_one else ByEpoch(3, (50, 9, 70), 16)
    order = (SameDatasetBatchSampler if batches_of_one else MixtureSampler)(3, sets, turns, 16)
    for step in (70, 3, 0, 71):
        for world in (1, 2, 4, 8):
            parts = [order.micro_batches(step, 2, rank, world) for rank in range(world)]
            micro = [np.concatenate([parts[rank][a][1] for rank in range(world)]) for a in range(2)]
            assert np.array_equal(np.concatenate(micro), order.step_rows(step)[1])


def test_ten_thousand_million_rows_need_no_memory():
    """Far into a run over huge sets, a step is computed from its number alone."""
    sets = tuple(EpochSampler(i, ((i * 10**10, (i + 1) * 10**10),), 512) for i in range(3))
    for order in (
        MixtureSampler(0, sets, ByWeight(0, counts_of([5, 3, 2])), 512),
        SameDatasetBatchSampler(0, sets, ByWeight(0, counts_of([5, 3, 2])), 512),
        SameDatasetBatchSampler(0, sets, ByEpoch(0, (10**10,) * 3, 512), 512),
    ):
        _, rows = order.step_rows(10**6)
        assert len(np.unique(rows)) == 512 and rows.max() > 9 * 10**9
