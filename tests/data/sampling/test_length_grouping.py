"""Batches of similar length: the line's texts, put together otherwise, by arithmetic."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data.sampling.length_grouping import LengthGroupedSampler, deal
from bge_ds.data.sampling.mixture import ByEpoch, SameDatasetBatchSampler
from bge_ds.data.sampling.sampler import EpochSampler

pytestmark = pytest.mark.core

LENGTHS = np.random.default_rng(1).integers(3, 500, 3000)


def length_order(rows=1000, batch=8, window=10, first=0, **more) -> LengthGroupedSampler:
    return LengthGroupedSampler(
        EpochSampler(4, ((first, first + rows),), batch), partial(np.take, LENGTHS), window=window, **more
    )


def places(epochs: np.ndarray, rows: np.ndarray) -> list[int]:
    return sorted((epochs * 10_000 + rows).tolist())


@given(
    rows=st.integers(1, 150), batch=st.integers(1, 24), window=st.integers(1, 12), epochs=st.integers(1, 4), whole=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_at_every_epoch_s_end_the_same_texts_were_seen(rows, batch, window, epochs, whole):
    """Windows end with epochs, so grouping neither loses nor doubles a text: the steps up to there hold the line's texts."""
    order = length_order(rows, batch, window, whole_batches=whole)
    found = [order.step_rows(step) for step in range(order.steps(epochs, drop_last=whole))]
    for epoch in range(1, epochs + 1):
        end = order.steps(epoch, drop_last=whole)
        if end:
            seen = places(*(np.concatenate(part) for part in zip(*found[:end], strict=True)))
            assert seen == places(*order.line.rows_at(np.arange(end * batch)))


def test_texts_of_a_batch_are_of_similar_length():
    """Within a window, batches do not overlap in length, and they come in no order of length."""
    order = length_order(800, 8, 50)
    lengths = np.array([LENGTHS[order.step_rows(step)[1]] for step in range(100)])
    for window in (lengths[:50], lengths[50:]):
        by_length = window[np.argsort(window.mean(1))]
        assert (by_length.max(1)[:-1] <= by_length.min(1)[1:]).all()
        assert abs(np.corrcoef(np.arange(50), window.mean(1))[0, 1]) < 0.4
    padded = (lengths.max(1) * 8).sum() / lengths.sum()
    assert padded < 1.05 < 1.5 < (LENGTHS[:800].reshape(100, 8).max(1) * 8).sum() / LENGTHS[:800].sum()


@pytest.mark.parametrize("batch", [8, 16, 64, 96])
def test_ranks_get_equal_shares_of_short_and_long_texts(batch):
    """Of lengths that rise evenly, every part of a batch has the same sum, and the longer half goes to no rank always."""
    dealt = deal(batch)
    assert np.array_equal(np.sort(dealt), np.arange(batch))
    for ranks in (2, 4, 8):
        sums = [part.sum() for part in np.split(dealt, ranks)]
        assert max(sums) - min(sums) <= (batch if batch % (2 * ranks) else 0)  # a text left over cannot be halved
    order = length_order(2000, 16, 50)
    tokens = [[LENGTHS[order.micro_batches(step, 1, rank, 2)[0][1]].sum() for rank in (0, 1)] for step in range(200)]
    assert 60 < np.sum(np.diff(tokens) > 0) < 140


def test_any_step_is_found_directly_and_on_any_ranks():
    """A resumed run asks for its step first, in a worker's copy of the order: it gets what a run that walked there got."""
    walked = length_order(500, 16)
    steps = [walked.step_rows(step) for step in range(120)]
    for step in (119, 31, 0, 64):
        fresh = pickle.loads(pickle.dumps(length_order(500, 16)))
        for world in (1, 2, 4, 8):
            parts = [fresh.micro_batches(step, 1, rank, world)[0][1] for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), steps[step][1])


def test_memory_is_a_window():
    """Of 1e10 texts, the lengths of one window alone are asked for, once for all of its steps."""
    asked = []
    order = LengthGroupedSampler(EpochSampler(0, ((0, 10**10),), 16), lambda rows: asked.append(len(rows)) or rows % 500)
    for step in range(10**6, 10**6 + 3):
        order.step_rows(step)
    assert len(asked) <= 2 and max(asked) <= 64 * 16


def test_batches_of_one_set_are_grouped_within_the_set():
    """With batches of one set, each set has windows of its own, which end where its epochs' whole batches do."""
    sizes, batch = (300, 130), 8
    sets = tuple(length_order(size, batch, first=1000 * i, whole_batches=True) for i, size in enumerate(sizes))
    order = SameDatasetBatchSampler(1, sets, ByEpoch(1, sizes, batch), batch)
    for epochs in (1, 2, 5):
        found = [order.step_rows(step) for step in range(order.steps(epochs))]
        assert all(len(set((rows // 1000).tolist())) == 1 for _, rows in found)
        seen = places(*(np.concatenate(part) for part in zip(*found, strict=True)))
        lines = [line.line.rows_at(np.arange(epochs * size // batch * batch)) for line, size in zip(sets, sizes, strict=True)]
        assert seen == places(*(np.concatenate(part) for part in zip(*lines, strict=True)))
