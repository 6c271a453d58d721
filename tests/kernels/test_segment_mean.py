"""The mean of each text's rows, and its vector at each row, against a loop over texts; the GPU's kernel in the interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import interpreter
import pytest
import torch

from bge_ds.kernels.packed import LengthRun
from bge_ds.kernels.segment_mean import segment_expand, segment_mean

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
RUNS = [LengthRun(2, 1), LengthRun(3, 5), LengthRun(1, 33), LengthRun(1, 70)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("width", [3, 130])
def test_equals_the_loop(width, dtype, tolerance):
    """Means and gradients: texts of one token and of more rows and features than a program takes at a time."""
    if interpreter.INTERPRETED and dtype == torch.float64:
        pytest.skip("the kernel adds in fp32")
    lengths = [length for n, length in RUNS for _ in range(n)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), width, dtype=torch.float64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = torch.stack([text.sum(0) / len(text) for text in exact.split(lengths)])
    out = segment_mean(x, cu_seqlens, RUNS, fused=interpreter.INTERPRETED)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - expected).abs().max() < tolerance
    weights = torch.randn(out.shape)
    mine, theirs = (
        torch.autograd.grad(out, x, weights.to(out.dtype))[0],
        torch.autograd.grad(expected, exact, weights.double())[0],
    )
    assert mine.dtype == dtype and (mine.double() - theirs).abs().max() < tolerance * weights.abs().max()


@needs_triton
def test_on_meta():
    """As a GPU would run it: one operation a row, nothing read back."""
    x = torch.empty(120, 8, device="meta", dtype=torch.bfloat16).requires_grad_()
    cu_seqlens = torch.empty(8, device="meta", dtype=torch.int32)
    out = segment_mean(x, cu_seqlens, RUNS)
    segment_expand(out, cu_seqlens, 120).sum().backward()
    assert out.shape == (7, 8) and x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_spread_equals_its_rows_repeated(dtype, tolerance):
    """Each text's vector at each of its tokens, none for a text without tokens; gradients are sums over the tokens."""
    if interpreter.INTERPRETED and dtype == torch.float64:
        pytest.skip("the kernel adds in fp32")
    lengths = [0, 1, 1, 0, 5, 33, 70]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    x = torch.randn(len(lengths), 130, dtype=torch.float64).to(dtype).requires_grad_()
    out = segment_expand(x, cu_seqlens, sum(lengths), fused=interpreter.INTERPRETED)
    assert torch.equal(out, torch.cat([row.expand(length, -1) for row, length in zip(x, lengths, strict=True)]))
    weights = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    expected = torch.stack([part.double().sum(0) for part in weights.split(lengths)])
    (found,) = torch.autograd.grad(out, x, weights)
    assert found.dtype == dtype and (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernel as it is."""
    interpreter.run_again(__file__)
