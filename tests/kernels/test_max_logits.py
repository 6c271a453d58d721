"""The largest logit of every word in every text, against the full matrix of logits; the GPU's kernels in the interpreter."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import interpreter
import pytest
import torch

from bge_ds.data.batches import Run
from bge_ds.kernels import max_logits as module
from bge_ds.kernels.max_logits import max_logits

RUNS = [Run(2, 1), Run(1, 3), Run(5, 4), Run(1, 13)]
LENGTHS = [length for n, length in RUNS for _ in range(n)]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
# The GPU's way takes no fp64; its products of 8 features and sums over 42 rows are fp32.
WAYS = [
    pytest.param(False, torch.float64, 1e-12, id="blocks"),
    pytest.param(True, torch.float32, 1e-5, id="fused", marks=interpreter.only),
]


def leaves(dtype, columns=37):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(LENGTHS), 8), (columns, 8), (columns,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def full(x, w, b):
    parts = (x @ w.T + b).split(LENGTHS)
    return torch.stack([part.max(0).values for part in parts])


@pytest.mark.parametrize("elements", [16, 100, 1 << 22])
@pytest.mark.parametrize("columns", [1, 37, 1500])
@pytest.mark.parametrize(("fused", "dtype", "tolerance"), WAYS)
def test_equals_the_full_matrix(monkeypatch, columns, elements, fused, dtype, tolerance):
    """Maxima and every gradient, in blocks of texts and columns of any size, those of the matrix that is never made."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 9)
    monkeypatch.setattr(module, "_GPU_BYTES", elements * columns // 2)  # 2, 12 or all rows
    mine, theirs = leaves(dtype, columns), leaves(torch.float64, columns)
    ours, expected = max_logits(*mine, STARTS, RUNS, fused=fused), full(*(x.to(dtype).double() for x in theirs))
    assert (ours - expected).abs().max() < tolerance
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (ours * weights.to(ours.dtype)).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=interpreter.only)])
def test_the_first_of_equal_tokens(fused):
    """Where several tokens reach the maximum, the gradient flows to the first, whole, as torch's own does."""
    x, w = torch.ones(sum(LENGTHS), 8).requires_grad_(), torch.ones(5, 8).requires_grad_()
    max_logits(x, w, None, STARTS, RUNS, fused=fused).sum().backward()
    first = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    first[STARTS[:-1]] = True
    assert (x.grad[first] == 5).all() and not x.grad[~first].any() and (w.grad == len(LENGTHS)).all()


@interpreter.only
def test_what_is_not_a_number_comes_out():
    """A NaN anywhere in a text is its maximum, as it is torch's: a loss that hid it would train on."""
    x, w, b = leaves(torch.float32)
    x.data[5] = float("nan")
    ours = max_logits(x, w, b, STARTS, RUNS, fused=True)
    assert ours.isnan().all(1).tolist() == [start <= 5 < end for start, end in pairwise(STARTS)]


@pytest.mark.parametrize(
    ("fused", "dtype"), [(False, torch.bfloat16), pytest.param(True, torch.float16, marks=interpreter.only)]
)
def test_sixteen_bits(fused, dtype):
    """16-bit states and weights give fp32 maxima, and gradients in the type of what they belong to."""
    mine = leaves(dtype)
    ours = max_logits(*mine, STARTS, RUNS, fused=fused)
    assert ours.dtype == torch.float32
    assert (ours - full(*(x.float() for x in mine))).abs().max() < 0.1
    ours.sum().backward()
    assert all(x.grad.dtype == dtype for x in mine)
    exact = [x.detach().float().requires_grad_() for x in mine]
    full(*exact).sum().backward()
    assert (mine[0].grad - exact[0].grad).abs().max() < 0.05 * exact[0].grad.abs().max()


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=interpreter.only)])
def test_no_bias(fused):
    """A head without a bias: the same, and nothing to give a gradient to."""
    x, w, _ = leaves(torch.float32)
    assert torch.allclose(max_logits(x, w, None, STARTS, RUNS, fused=fused), full(x, w, 0.0), rtol=1e-5, atol=1e-6)
    max_logits(x, w, None, STARTS, RUNS, fused=fused).sum().backward()
    assert x.grad.abs().max() > 0 and w.grad.abs().max() > 0


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
def test_on_meta():
    """As a GPU would run it: a product and a kernel a chunk, whatever the lengths, and nothing read back."""
    x, w, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta").requires_grad_() for shape in ((42, 8), (37, 8), (37,)))
    out = max_logits(x, w, b, torch.empty(10, dtype=torch.int64, device="meta"), RUNS)
    out.sum().backward()
    assert out.shape == (9, 37) and out.dtype == torch.float32 and [t.grad.dtype for t in (x, w, b)] == [torch.bfloat16] * 3


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernels as they are."""
    interpreter.run_again(__file__)
