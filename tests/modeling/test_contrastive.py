"""The loss against its formula, query by query."""

from __future__ import annotations

import pytest
import torch

from bge_ds.modeling.contrastive import false_negatives, info_nce, info_nce_own_group


def test_info_nce_is_the_formula():
    """Mean over queries of -log softmax at the positive, hidden columns left out of the sum."""
    torch.manual_seed(0)
    q, p = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    target = torch.tensor([0, 3, 5])
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 6] = hidden[2, 0] = True
    expected = 0.0
    for b in range(3):
        terms = [torch.exp(q[b] @ p[j] / 0.5) for j in range(7) if not hidden[b, j]]
        expected -= torch.log(torch.exp(q[b] @ p[target[b]] / 0.5) / sum(terms)) / 3
    assert info_nce(q, p, target, 0.5, hidden).item() == pytest.approx(expected.item(), rel=1e-12)
    assert info_nce(q, p, target, 0.5).item() > expected.item()


def test_own_group_sees_its_group_only():
    """With in-batch negatives off, query b's loss depends on passages b G .. b G + G - 1 and no others."""
    torch.manual_seed(0)
    q, p = torch.randn(2, 4), torch.randn(6, 4, requires_grad=True)
    whole = info_nce_own_group(q, p, 0.5)
    expected = torch.stack([info_nce(q[b : b + 1], p[3 * b : 3 * b + 3], torch.tensor([0]), 0.5) for b in range(2)]).mean()
    assert torch.allclose(whole, expected)
    info_nce_own_group(q[:1], p[:3], 0.5).backward()
    assert not p.grad[3:].any() and p.grad[:3].any()


def test_false_negatives_by_content():
    """A passage that is any listed positive of a query is hidden from it, its own target is not, nobody else's rows are."""
    hashes = torch.tensor([11, 12, 13, 12, 14, 11])
    target = torch.tensor([0, 3])
    known, owner = torch.tensor([11, 13, 12]), torch.tensor([0, 0, 1])
    hidden = false_negatives(hashes, known, owner, target)
    assert hidden.tolist() == [[False, False, True, False, False, True], [False, True, False, False, False, False]]


def test_hashes_with_the_highest_bit_set():
    """64-bit hashes are stored as signed numbers; those above 2^63 must match too."""
    hashes = torch.tensor([-5, 3])
    assert false_negatives(hashes, torch.tensor([-5]), torch.tensor([0]), torch.tensor([1])).tolist() == [[True, False]]
