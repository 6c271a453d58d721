"""Micro batches by tokens: bins of whole texts, the same for any number of ranks, each found without those before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ds.data import dataloader
from bge_ds.data.sampling.sampler import EpochSampler
from bge_ds.data.sampling.token_batching import TokenBatchSampler, cut_by_tokens

pytestmark = pytest.mark.core

LENGTHS = np.random.default_rng(0).integers(3, 60, 211)
LONGEST, BUDGET = 40, 100


def token_order(step_bins=4, budget=BUDGET, chunk=64, lengths=LENGTHS, **line) -> TokenBatchSampler:
    """Chunks of few texts, so that a short line has many borders; texts are cut at LONGEST."""
    return TokenBatchSampler(
        EpochSampler(7, ((0, len(lengths)),), 1, **line), lengths.__getitem__, LONGEST, budget, step_bins, chunk
    )


def bins_within(order: TokenBatchSampler, epochs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bins, one after the other, up to the one that holds the last text of these epochs."""
    found, texts = [], 0
    while texts < epochs * len(order):
        found.append(order.bin(len(found)))
        texts += len(found[-1][0])
    return found


def tokens(rows: np.ndarray) -> int:
    return int(np.minimum(LENGTHS[rows], LONGEST).sum())


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=200), budget=st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_packing_equals_taking_texts_one_by_one(lengths, budget):
    """The vectorised cuts are those of the plain loop, also where texts exceed the budget or have no token."""
    expected, held = [0], 0
    for i, length in enumerate(lengths):
        if i > expected[-1] and held + length > budget:
            expected.append(i)
            held = 0
        held += length
    assert cut_by_tokens(np.array(lengths), budget).tolist() == [*expected, len(lengths)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_text_once_an_epoch_and_no_bin_above_the_budget(shuffle):
    """The bins hold the sequence of its sampler without a gap or a repeat; none is empty and none exceeds the budget."""
    order = token_order(shuffle=shuffle)
    bins = bins_within(order, 4)
    epochs, rows = (np.concatenate(parts) for parts in zip(*bins, strict=True))
    for epoch in range(4):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(len(LENGTHS)))
    expected = order.line.rows_at(np.arange(len(rows)))
    assert np.array_equal(epochs, expected[0]) and np.array_equal(rows, expected[1])
    assert all(len(rows) > 0 and tokens(rows) <= BUDGET for _, rows in bins)


def test_bins_are_full():
    """No bin could have taken the text that follows it, but where a chunk's end closed it: else tokens would be wasted."""
    bins, texts, closed = bins_within(token_order(), 4), 0, 0
    for (_, rows), (_, following) in pairwise(bins):
        texts += len(rows)
        could = tokens(rows) + tokens(following[:1]) <= BUDGET
        assert not could or texts % 64 == 0
        closed += texts % 64 == 0
    assert closed >= 4 * len(LENGTHS) // 64 - 1


def test_any_step_is_found_directly():
    """A resumed run asks for step 30 first: it gets what a run that walked there gets, without packing all before again."""
    walked = token_order()
    steps = [walked.micro_batches(step, 2, 1, 2) for step in range(40)]
    for step in (39, 30, 0, 31):
        for (epochs, rows), (epochs_walked, rows_walked) in zip(
            token_order().micro_batches(step, 2, 1, 2), steps[step], strict=True
        ):
            assert np.array_equal(epochs, epochs_walked) and np.array_equal(rows, rows_walked)
    asked = []
    walked.lengths = lambda rows: asked.append(len(rows)) or LENGTHS[rows]
    walked._last = None
    walked.bin(100)
    assert asked == [64]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_any_ranks_and_accumulation_take_the_same_bins(world, accumulation):
    """Accumulation step a of rank r takes bin a W + r of the step, so W and A shift work but change no step."""
    order = token_order(step_bins=4)
    for step in (0, 3, 17):
        ranks = [order.micro_batches(step, accumulation, rank, world) for rank in range(world)]
        for a in range(accumulation):
            for rank in range(world):
                epochs, rows = order.bin(4 * step + a * world + rank)
                assert np.array_equal(ranks[rank][a][0], epochs) and np.array_equal(ranks[rank][a][1], rows)


@pytest.mark.parametrize("epochs", [1, 3, 0.4])
@pytest.mark.parametrize("chunk", [64, 211, 1000])
def test_steps_of_epochs(epochs, chunk):
    """A run takes every bin that begins within its epochs; with drop_last, the full steps of them only."""
    order, places = token_order(step_bins=5, chunk=chunk), np.ceil(epochs * len(LENGTHS))
    begin, bins = 0, 0
    while begin < places:
        begin += len(order.bin(bins)[0])
        bins += 1
    fresh = token_order(step_bins=5, chunk=chunk)
    assert fresh.filled_steps(epochs) == bins / 5
    assert fresh.steps(epochs) == -(-bins // 5) and fresh.steps(epochs, drop_last=True) == bins // 5


def test_only_needed_chunks_are_counted():
    """A short run over huge data starts at once: what max_steps does not reach is not packed."""
    lengths = np.full(10**6, 10)
    order = token_order(step_bins=4, chunk=100, lengths=lengths)
    assert order.epochs(30) == 30 * 4 * 10 / 10**6
    assert len(order._counted) == 13  # 120 bins of 10 texts, and the chunk in which the next one begins


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_asks_for_a_rank_s_bins(tmp_path, workers, monkeypatch):
    """Loader workers, each with its own place in the line, give the steps in order: the bins of this rank and no other."""
    monkeypatch.setattr(dataloader.shard_reader, "open_folders", lambda folders: None)
    order = token_order(step_bins=6)
    found = dataloader.steps(
        [tmp_path], order, lambda shards, epochs, rows: (epochs, rows), first_step=5, end_step=12, accumulation=3, rank=1,
        world=2, workers=workers, pin_memory=False, context="fork",
    )  # fmt: skip
    for step, batches in enumerate(found, start=5):
        for a, (epochs, rows) in enumerate(batches):
            expected = order.bin(6 * step + 2 * a + 1)
            assert np.array_equal(epochs, expected[0]) and np.array_equal(rows, expected[1])
    assert step == 11
