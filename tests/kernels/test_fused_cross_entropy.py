"""The Triton vocabulary cross entropy against torch's own in fp64, in Triton's interpreter.

Triton decides at its first import whether it interprets, so `test_in_the_interpreter` runs this file again in a process that
has asked for it.
"""

from __future__ import annotations

from importlib.util import find_spec

import interpreter
import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import inputs

from bge_ds.kernels import linear_cross_entropy as module
from bge_ds.kernels import matmul
from bge_ds.kernels.linear_cross_entropy import linear_cross_entropy


def check(leaves, target, tolerance):
    """Sum, hits and every gradient against full logits in fp64."""
    x, w, b = leaves
    loss, correct = linear_cross_entropy(x, w, target, b, fused=True)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    logits = F.linear(*exact)
    expected = F.cross_entropy(logits, target, reduction="sum")
    assert torch.allclose(loss.double(), expected, rtol=tolerance)
    if x.dtype == torch.float32:
        assert correct == (logits.argmax(-1) == target).sum()
    ours = torch.autograd.grad(loss * 0.37, [t for t in leaves if t is not None])
    theirs = torch.autograd.grad(expected * 0.37, [t for t in exact if t is not None])
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double() - other).abs().max() <= tolerance * max(other.abs().max(), 1e-2)


@interpreter.only
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (37, 101, 5), (70, 300, 16)])
def test_equals_the_plain_matrix(monkeypatch, shape, bias):
    """fp32: odd shapes, several blocks of rows and of columns, rows that are no multiple of a program's."""
    from bge_ds.kernels import cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "_COLUMNS", 64)
    monkeypatch.setattr(cross_entropy_triton, "_ROWS", 8)
    monkeypatch.setattr(module, "_GPU_ROWS", (10, 20))
    leaves, target = inputs(*shape, dtype=torch.float32, bias=bias)
    check(leaves, target, 1e-5)


@interpreter.only
def test_memory_behind_the_rows_is_never_looked_at(monkeypatch):
    """Rows lie further apart than they have columns; what is between them, NaN here, reaches no sum and no gradient."""
    from bge_ds.kernels import cross_entropy_triton

    def poisoned(*args):
        held = matmul.empty_aligned(*args)
        assert held.stride(0) % 64 == 0 and held.stride(0) > held.shape[1]
        held._base.fill_(float("nan"))
        return held

    monkeypatch.setattr(module, "empty_aligned", poisoned)
    monkeypatch.setattr(cross_entropy_triton, "empty_aligned", poisoned)
    leaves, target = inputs(37, 101, 5, dtype=torch.float32)
    check(leaves, target, 1e-5)


@interpreter.only
def test_sixteen_bits():
    """fp16: logits and their gradient in 16 bits, everything between in fp32."""
    leaves, target = inputs(37, 101, 32, dtype=torch.float16)
    check([leaves[0].detach().mul(0.2).requires_grad_(), *leaves[1:]], target, 4e-3)


@interpreter.only
def test_ends_of_the_row_and_ties():
    """Targets in the first and the last column; a logit equal to the target's is no miss, as on the CPU."""
    x, w = torch.eye(3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    loss, correct = linear_cross_entropy(x, w, torch.tensor([0, 4, 2]), fused=True)
    assert correct == 3 and torch.allclose(loss, 3 * torch.tensor(5.0).log())
    loss.backward()
    assert torch.allclose(w.grad.sum(0), torch.zeros(3), atol=1e-6)


@interpreter.only
def test_no_rows_and_frozen_inputs():
    """A step without a masked token is a loss of 0; only what asks for a gradient gets one."""
    (x, w, b), target = inputs(0, 5, 3, dtype=torch.float32)
    loss, correct = linear_cross_entropy(x, w, target, b, fused=True)
    loss.backward()
    assert loss == 0 and correct == 0 and not w.grad.any() and not b.grad.any()
    (x, w, b), target = inputs(4, 6, 3, dtype=torch.float32)
    linear_cross_entropy(x, w.detach(), target, b.detach(), fused=True)[0].backward()
    assert x.grad is not None and w.grad is None and b.grad is None


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_meta(dtype):
    """As a GPU would run it: nothing is read back, and 16-bit products are added to an fp32 gradient where they are made."""
    x, w, b = (torch.empty(*shape, dtype=dtype, device="meta").requires_grad_() for shape in ((5000, 8), (300, 8), (300,)))
    loss, _ = linear_cross_entropy(x, w, torch.empty(5000, dtype=torch.int64, device="meta"), b)
    loss.backward()
    assert loss.dtype == torch.float32 and [t.grad.dtype for t in (x, w, b)] == [dtype] * 3
    assert matmul._sums_in_fp32("meta", torch.bfloat16) or torch.__version__ < "2.12"  # a fault of 2.11 on meta alone


def test_blocks_of_a_gpu():
    """Few passes over the gradient of W, and at most 1/8 of the memory of full logits (16 bits, their fp32 copy, gradient)."""
    for columns in (30_522, 250_002):
        blocks = module._blocks(16_384, module._gpu_step(columns, 2))
        assert len(blocks) <= 8 and blocks[0].start == 0 and blocks[-1].stop == 16_384
        held = max(b.stop - b.start for b in blocks) * columns * 2 + columns * 768 * 4
        assert held <= 16_384 * columns * (2 + 4 + 4) / 8


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernels as they are."""
    interpreter.run_again(__file__)
