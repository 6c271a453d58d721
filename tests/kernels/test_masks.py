"""The masks' shares and rules: what makes RetroMAE's objective what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_ds.data.sampling.sampler import mix64
from bge_ds.kernels import masks


def keys(n, seed=0, epoch=0):
    return torch.from_numpy(mix64(seed, epoch, np.arange(n)).view(np.int64))


def within(observed: float, share: float, n: int) -> bool:
    return abs(observed - share) < 3 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("length", [32, 512, 2048])
def test_share_of_masked_words(length):
    """The encoder masks the share asked for at any length (the old trainer stopped at 512 tokens), within 3 standard errors."""
    texts = 200_000 // length
    key_T = keys(texts).repeat_interleave(length)
    words_T = (torch.arange(length) // 2).repeat(texts)
    inner_T = torch.ones_like(words_T, dtype=torch.bool)
    masked = masks.encoder_masked(key_T, words_T, inner_T, 0.3).view(texts, length)
    assert torch.equal(masked[:, 0::2], masked[:, 1::2])  # sub-words of a word go together
    assert within(masked.float().mean().item(), 0.3, texts * length // 2)
    # No place is favoured and neighbours are independent.
    assert (masked[:, ::2].float().mean(0) - 0.3).abs().max() < 5 * (0.21 / texts) ** 0.5
    pairs = (masked[:, 0:-2:2] & masked[:, 2::2]).float().mean().item()
    assert within(pairs, 0.09, texts * (length // 2 - 1))


@pytest.mark.parametrize("length", [32, 512, 2048])
def test_decoder_visibility_rules(length):
    """Diagonal hidden, position 0 visible to all others, words whole, half hidden, another sample for every row."""
    texts = max(1, 1 << 19 >> (length.bit_length() * 2 - 2))
    words = torch.cat([torch.tensor([0]), 1 + torch.arange(length - 2) // 2, torch.tensor([length])])
    visible = masks.decoder_visible(keys(texts), words.repeat(texts, 1), 0.5)
    assert visible.shape == (texts, length, length)
    assert not visible.diagonal(dim1=1, dim2=2).any()
    assert visible[:, 1:, 0].all()
    first, second = visible[:, :, 1 : length - 1 : 2], visible[:, :, 2 : length - 1 : 2]
    rows = torch.arange(length)[:, None]
    columns = torch.arange(1, length - 1, 2)[None, : second.shape[-1]]
    own = (rows == columns) | (rows == columns + 1)
    assert torch.equal(first[..., : second.shape[-1]] | own, second | own)
    words_seen = (first[..., : second.shape[-1]] & ~own).sum().item()
    n = texts * int((~own).sum())
    assert within(words_seen / n, 0.5, n)
    if length > 32:  # 15 words have too few subsets to be all different
        assert len(torch.unique(first.flatten(0, 1).int(), dim=0)) == texts * length  # every row draws its own


def test_rows_are_independent():
    """What one decoder row sees says nothing of what another, near or far, or the same row of another text, sees."""
    texts, length = 64, 128
    words = torch.arange(length).repeat(texts, 1)
    seen = masks.decoder_visible(keys(texts), words, 0.5)[:, 1:-1, 1:-1].double() - 0.5
    for shift in (1, 2, 63):
        first, second = seen[:, shift:], seen[:, :-shift]
        places = torch.arange(length - 2)
        own = (places[:-shift, None] == places) | (places[shift:, None] == places)
        products = (first * second)[:, ~own]
        assert abs(products.mean().item()) < 3 * 0.25 / products.numel() ** 0.5
    between = (seen[1:] * seen[:-1])[:, ~torch.eye(length - 2, dtype=torch.bool)]
    assert abs(between.mean().item()) < 3 * 0.25 / between.numel() ** 0.5


def test_eighty_ten_ten():
    """Of the masked tokens 80 % become the mask, 10 % random ids (all of the vocabulary), 10 % stay."""
    n = 300_000
    key_T, positions_T = keys(3).repeat_interleave(n // 3), torch.arange(n // 3).repeat(3)
    ids_T = torch.full((n,), 7)
    chosen = masks.corrupt(ids_T, key_T, positions_T, mask_id=4, vocab_size=1000)
    m = len(chosen)
    assert within((chosen == 4).float().mean().item(), 0.8 + 0.1 / 1000, m)
    assert within((chosen == 7).float().mean().item(), 0.1 + 0.1 / 1000, m)
    random = chosen[(chosen != 4) & (chosen != 7)]
    assert len(torch.unique(random)) == 998


def test_masks_change_with_epoch_and_row_only():
    """The same (seed, epoch, row) gives the same mask anywhere; another epoch, row or seed another."""
    words = torch.arange(64).repeat(4, 1)
    a, b = (masks.decoder_visible(keys(4), words, 0.5) for _ in range(2))
    assert torch.equal(a, b)
    for other in (keys(4, epoch=1), keys(4, seed=1)):
        assert 0.4 < (masks.decoder_visible(other, words, 0.5) != a).float().mean() < 0.6
    alone = masks.decoder_visible(keys(4)[2:3], words[2:3], 0.5)
    assert torch.equal(alone[0], a[2])


def test_any_rows_by_themselves():
    """Rows asked for alone are the rows of the whole, as a kernel that works in blocks needs them."""
    words = (torch.arange(70) // 2).repeat(3, 1)
    whole = masks.decoder_visible(keys(3), words, 0.5)
    for first, last in ((0, 70), (0, 1), (1, 69), (17, 40), (69, 70)):
        assert torch.equal(masks.decoder_visible(keys(3), words, 0.5, first, last), whole[:, first:last])


def test_the_bits_of_a_known_mask():
    """The hash itself never changes: a run resumed with another version of the code would see other masks."""
    visible = masks.decoder_visible(keys(2), torch.arange(9).repeat(2, 1), 0.5)
    assert visible.flatten(1).int().matmul(torch.arange(1, 82, dtype=torch.int32)).tolist() == [1727, 1933]


def test_a_share_of_everything():
    """A share of 1 hides all but the first and the closing token, and a share of 0 nothing but the row's own."""
    words = torch.arange(9).repeat(2, 1)
    none, every = (masks.decoder_visible(keys(2), words, share)[:, 1:-1] for share in (1.0, 0.0))
    assert none[..., 0].all() and none[..., -1].all() and not none[..., 1:-1].any()
    assert (every.sum(-1) == 8).all()
