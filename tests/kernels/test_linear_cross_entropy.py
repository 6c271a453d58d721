"""The cross entropy without the logits is the plain one: value, hits, and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bge_ds.kernels import linear_cross_entropy as module
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.core


def inputs(rows, columns, width, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(rows + columns)
    x, w = (torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, columns))
    b = torch.randn(columns, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    target = torch.randint(columns, (rows,), generator=generator)
    return [t if t is None else t.requires_grad_() for t in (x, w, b)], target


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (37, 101, 5), (64, 2, 16)])
@pytest.mark.parametrize("block", [1, 250, 1 << 24])
def test_equals_the_plain_matrix(monkeypatch, shape, bias, block):
    """Any block size, odd shapes, one row, one column: the same sum, hits and gradients (fp64; the sum itself is fp32)."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 1)
    (x, w, b), target = inputs(*shape, bias=bias)
    loss, correct = linear_cross_entropy(x, w, target, b)
    logits = F.linear(x, w, b)
    expected = F.cross_entropy(logits, target, reduction="sum")
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    assert correct == (logits.argmax(-1) == target).sum()
    leaves = [t for t in (x, w, b) if t is not None]
    ours = torch.autograd.grad(loss * 0.37, leaves)
    for mine, theirs in zip(ours, torch.autograd.grad(expected * 0.37, leaves), strict=True):
        # The softmax and the sums over rows are taken in fp32.
        assert (mine - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 1e-2)


def test_no_rows_is_a_loss_of_zero():
    """A step in which no token is masked must not stop the run: zero loss, zero gradients."""
    (x, w, b), target = inputs(0, 5, 3)
    loss, correct = linear_cross_entropy(x, w, target, b)
    loss.backward()
    assert loss == 0 and correct == 0 and not w.grad.any() and not b.grad.any()


def test_frozen_inputs_get_no_gradient():
    """Only what asks for a gradient gets one, and no work is done for the rest."""
    (x, w, b), target = inputs(4, 6, 3)
    w.requires_grad_(False)
    b.requires_grad_(False)
    linear_cross_entropy(x, w, target, b)[0].backward()
    assert x.grad is not None and w.grad is None and b.grad is None


def test_a_second_backward_is_refused():
    """The gradients are scaled in place: a second backward must fail, not scale them again."""
    (x, w, b), target = inputs(4, 6, 3)
    loss, _ = linear_cross_entropy(x, w, target, b)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|double backward"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """16-bit inputs: the loss is summed in fp32; gradients within their own rounding."""
    (x, w, b), target = inputs(50, 80, 16, dtype)
    loss, _ = linear_cross_entropy(x, w, target, b)
    assert loss.dtype == torch.float32
    loss.backward()
    reference = [t.detach().double().requires_grad_() for t in (x, w, b)]
    F.cross_entropy(F.linear(*reference), target, reduction="sum").backward()
    for mine, theirs in zip((x, w, b), reference, strict=True):
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - theirs.grad).abs().max() < 0.03 * theirs.grad.abs().max()
