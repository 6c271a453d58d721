"""Choosing texts and packing them: what a batch holds."""

from __future__ import annotations

import pickle
from collections import Counter

import helpers
import numpy as np
import pytest
import torch

from bge_ds.data.collate import ContrastiveBatch, PretrainBatch, choose_groups, shorten
from bge_ds.data.sampling.sampler import mix64
from bge_ds.kernels.packed import pack

pytestmark = pytest.mark.core


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


def choose_group(positives: int, negatives: int, group_size: int, *key: int) -> tuple[int, np.ndarray]:
    """The draw of one group by its definition, which `choose_groups` makes for many at once."""
    repeats = -(-(group_size - 1) // negatives) if negatives else 0
    drawn = np.argsort(mix64(*key, 2, np.arange(repeats * negatives)), kind="stable")[: group_size - 1]
    return int(mix64(*key, 1) % np.uint64(positives)), drawn % max(1, negatives)


@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_many_groups_are_drawn_as_one_is(group_size):
    """A group's draw must not depend on its neighbours in the batch: another batch size would train on other texts."""
    rng = np.random.default_rng(1)
    positives_B, negatives_B = rng.integers(1, 5, 200), rng.integers(0, 20, 200)
    epochs_B, rows_B = rng.integers(0, 3, 200), rng.integers(0, 10**10, 200)
    chosen_B, chosen_BN = choose_groups(positives_B, negatives_B, group_size, 7, epochs_B, rows_B)
    assert chosen_BN.shape == (200, group_size - 1) and (negatives_B == 0).any()
    for b in range(200):
        positive, drawn = choose_group(positives_B[b], negatives_B[b], group_size, 7, int(epochs_B[b]), int(rows_B[b]))
        assert chosen_B[b] == positive
        assert chosen_BN[b].tolist() == (drawn.tolist() if negatives_B[b] else [-1] * (group_size - 1))


def draw(positives: int, negatives: int, group_size: int, count: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The draws of rows 0..count-1, all with lists of these lengths."""
    listed = (np.full(count, positives), np.full(count, negatives))
    return choose_groups(*listed, group_size, 0, np.full(count, epoch), np.arange(count))


def test_negatives_are_drawn_without_replacement():
    """Enough negatives: all different. Fewer: each as often as the repeated list allows. None: none."""
    for chosen in draw(2, 9, 8, 50)[1].tolist():
        assert len(set(chosen)) == 7
    for chosen in draw(1, 3, 8, 50)[1].tolist():
        counts = Counter(chosen)
        assert max(counts.values()) <= 3 and set(counts) == {0, 1, 2}
    assert (draw(1, 0, 8, 5)[1] == -1).all()


@pytest.mark.parametrize("what", ["positive", "negative"])
def test_draws_are_uniform_and_change_with_the_epoch(what):
    """Each positive, and each negative, is as likely as the others; an epoch later the draw is another."""
    values = np.array([draw(4, 4, 2, 200, epoch)[0 if what == "positive" else 1].ravel() for epoch in range(20)])
    assert np.abs(np.bincount(values.ravel(), minlength=4) - 1000).max() < 130  # 4.7 standard deviations
    assert 0.1 < (values[0] == values[1]).mean() < 0.4


def test_types_shorten_groups():
    """one negative of only_1neg; of symmetric_class each negative at most once; of others what was drawn."""
    negatives_B = np.array([9, 9, 3, 9, 3, 0])
    drawn_BN = choose_groups(np.ones(6, int), negatives_B, 5, 0, np.zeros(6, int), np.arange(6))[1]
    types = ["only_1neg", "symmetric_class", "symmetric_class", None, "normal", "only_1neg"]
    short_BN = shorten(drawn_BN, negatives_B, types)
    assert short_BN[0].tolist() == [drawn_BN[0, 0], -1, -1, -1] and short_BN[2].tolist() == [0, 1, 2, -1]
    assert np.array_equal(short_BN[[1, 3, 4, 5]], drawn_BN[[1, 3, 4, 5]]) and (drawn_BN[0] >= 0).all()


def contrastive_batch(vocab_size: int) -> ContrastiveBatch:
    texts, _ = pack(helpers.random_texts([5, 70, 3, 3], vocab_size=vocab_size))
    hashes = torch.tensor([-(2**63), 2**63 - 1])
    return ContrastiveBatch(
        texts=texts, queries=2, own_BG=torch.tensor([[0, -1], [1, -1]]), hashes_P=hashes, known_BK=hashes[:, None],
        own_only_B=torch.tensor([True, False]), rows_B=torch.tensor([7, 2**40]),
        teacher_BG=torch.tensor([[0.5, 0.0], [-1.0, 0.0]]), taught_B=torch.tensor([True, False]),
    )  # fmt: skip


def pretrain_batch(vocab_size: int) -> PretrainBatch:
    texts, _ = pack(helpers.random_texts([5, 70, 3], vocab_size=vocab_size))
    keys = torch.tensor([1, -5, 2**62])
    return PretrainBatch(
        texts=texts, words_T=texts.positions_T // 2, keys_N=keys, rows_N=torch.tensor([3, 1, 2]),
        masked_M=torch.tensor([4, 9, 77]),
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [1 << 16, 250_002])
@pytest.mark.parametrize("make", [contrastive_batch, pretrain_batch])
def test_a_batch_survives_its_way_from_a_worker(make, vocab_size):
    """Narrow on the way, the same on arrival: every value, type and shape, the negative and 64-bit ones too."""
    batch = make(vocab_size)
    helpers.assert_same_batch(pickle.loads(pickle.dumps(batch)), batch)


def test_a_batch_travels_in_its_own_bytes():
    """Two bytes an id, word or masked token: plain pickle, not torch's storages, each a file of its own."""
    texts, _ = pack(helpers.random_texts([512] * 16, vocab_size=30_000))
    masked_M = torch.arange(0, 8192, 3)
    batch = PretrainBatch(texts, texts.positions_T, *torch.ones(2, 16, dtype=torch.int64), masked_M)
    sent = pickle.dumps(batch)
    assert len(sent) < 4 * 8192 + 2 * len(masked_M) + 2000 and b"torch.storage" not in sent and b"_rebuild_tensor" not in sent
