"""The largest logit of every word in every text, against the full matrix of logits."""

from __future__ import annotations

import pytest
import torch

from bge_ds.data.batches import Run
from bge_ds.kernels import max_logits as module
from bge_ds.kernels.max_logits import max_logits

RUNS = [Run(2, 1), Run(1, 3), Run(5, 4)]


def leaves(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = sum(n * length for n, length in RUNS)
    shapes = ((rows, 8), (37, 8), (37,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def full(x, w, b):
    parts = (x @ w.T + b).split([length for n, length in RUNS for _ in range(n)])
    return torch.stack([part.max(0).values for part in parts])


@pytest.mark.parametrize("elements", [16, 100, 1 << 22])
def test_equals_the_full_matrix(monkeypatch, elements):
    """Maxima and every gradient, in blocks of texts and columns of any size, those of the matrix that is never made."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 9)
    mine, theirs = leaves(torch.float64), leaves(torch.float64)
    ours, expected = max_logits(*mine, RUNS), full(*theirs)
    assert (ours - expected).abs().max() < 1e-12
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-12


def test_sixteen_bits():
    """bf16 states and weights give fp32 maxima, and gradients in the type of what they belong to."""
    mine = leaves(torch.bfloat16)
    ours = max_logits(*mine, RUNS)
    assert ours.dtype == torch.float32
    assert (ours - full(*(x.float() for x in mine))).abs().max() < 0.1
    ours.sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in mine)


def test_no_bias():
    """A head without a bias: the same, and nothing to give a gradient to."""
    x, w, _ = leaves(torch.float64)
    assert torch.allclose(max_logits(x, w, None, RUNS), full(x, w, 0.0), rtol=1e-12)
    max_logits(x, w, None, RUNS).sum().backward()
    assert x.grad.abs().max() > 0 and w.grad.abs().max() > 0
