"""Choosing texts and packing them: what a batch holds."""

from __future__ import annotations

from collections import Counter

import helpers
import numpy as np
import pytest
import torch

from bge_ds.data.batches import choose_group, cut, pack


def test_pack_keeps_every_text():
    """Texts come back whole from the row, in the caller's order, through place_N."""
    texts = helpers.random_texts([5, 17, 3, 40, 17, 1])
    packed, order = pack(texts)
    for i, text in enumerate(texts):
        n = int(packed.place_N[i])
        part = slice(int(packed.cu_seqlens[n]), int(packed.cu_seqlens[n + 1]))
        assert order[n] == i
        assert np.array_equal(packed.ids_T[part].numpy(), text)
        assert torch.equal(packed.positions_T[part], torch.arange(len(text)))
    assert packed.runs == [(1, 1), (1, 3), (1, 5), (2, 17), (1, 40)]
    assert packed.padded_tokens == 6 * 40 and packed.max_length == 40


def test_moving_a_batch_moves_every_tensor():
    """to() reaches nested batches; a tensor left behind would fail only on a GPU."""
    packed, _ = pack(helpers.random_texts([4, 2]))
    moved = packed.to("meta")
    assert all(t.device.type == "meta" for t in (moved.ids_T, moved.positions_T, moved.cu_seqlens, moved.place_N))
    assert moved.runs == packed.runs


def test_cut_keeps_the_closing_tokens():
    row = np.arange(10)
    assert cut(row, 6, 1).tolist() == [0, 1, 2, 3, 4, 9]
    assert cut(row, 6, 2).tolist() == [0, 1, 2, 3, 8, 9]
    assert cut(row, 10, 1) is row


def test_negatives_are_drawn_without_replacement():
    """Enough negatives: all different. Fewer: each as often as the repeated list allows. None: none."""
    for key in range(50):
        _, chosen = choose_group(2, 9, 8, 0, 0, key)
        assert len(set(chosen.tolist())) == 7
        _, chosen = choose_group(1, 3, 8, 0, 0, key)
        counts = Counter(chosen.tolist())
        assert len(chosen) == 7 and max(counts.values()) <= 3 and set(counts) == {0, 1, 2}
    assert choose_group(1, 0, 8, 0)[1].size == 0
    assert choose_group(1, 5, 1, 0)[1].size == 0


@pytest.mark.parametrize("what", ["positive", "negative"])
def test_draws_are_uniform_and_change_with_the_epoch(what):
    """Each positive, and each negative, is as likely as the others; an epoch later the draw is another."""
    draws = [choose_group(4, 4, 2, 7, epoch, row) for epoch in range(20) for row in range(200)]
    values = [positive if what == "positive" else int(negatives[0]) for positive, negatives in draws]
    counts = np.bincount(values, minlength=4)
    assert np.abs(counts - 1000).max() < 130  # 4.7 standard deviations
    same = np.mean([values[row] == values[200 + row] for row in range(200)])
    assert 0.1 < same < 0.4
