"""The largest logit of every word in every text, against the full matrix of logits; the GPU's kernels in the interpreter."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import interpreter
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bge_ds.kernels import matmul
from bge_ds.kernels import max_logits as module
from bge_ds.kernels.max_logits import max_logits
from bge_ds.kernels.packed import LengthRun

RUNS = [LengthRun(2, 1), LengthRun(1, 2), LengthRun(1, 3), LengthRun(5, 4), LengthRun(1, 13)]
LENGTHS = [length for n, length in RUNS for _ in range(n)]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
# The Triton kernels take no fp64; its products of 8 features and sums over 44 rows are fp32.
VARIANTS = [
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
@pytest.mark.parametrize(("fused", "dtype", "tolerance"), VARIANTS)
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


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=interpreter.only)])
def test_what_is_not_a_number_comes_out(fused):
    """A NaN anywhere in a text is its maximum, the first of them, as it is torch's: a loss that hid it would train on."""
    x, w, b = leaves(torch.float32)
    x.data[5:7] = float("nan")
    ours = max_logits(x, w, b, STARTS, RUNS, fused=fused)
    assert ours.isnan().all(1).tolist() == [start <= 5 < end for start, end in pairwise(STARTS)]
    ours.sum().backward()
    assert x.grad[5].any() and not x.grad[4].any() and not x.grad[6].any()


@interpreter.only
def test_unused_columns_reach_nothing(monkeypatch):
    """Rows of logits begin at multiples of 16 bytes; NaNs between them change neither maxima nor gradients."""

    buffers, empty_aligned = [], module.empty_aligned

    def poisoned(*args):
        buffers.append(empty_aligned(*args))
        buffers[-1]._base.fill_(float("nan"))
        return buffers[-1]

    def run():
        leaves_ = leaves(torch.float32)
        out = max_logits(*leaves_, STARTS, RUNS, fused=True)
        return out, *torch.autograd.grad(out.square().sum(), leaves_)

    expected = run()
    monkeypatch.setattr(module, "empty_aligned", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert len(buffers) == 2 and all(held.stride(0) > held.shape[1] and held.stride(0) % 16 == 0 for held in buffers)


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


class Calls(TorchDispatchMode):
    """The names of all operations, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
def test_calls_do_not_depend_on_lengths(monkeypatch):
    """As a GPU would run it, on meta: texts of many lengths cost the calls of texts of few, one kernel each way a chunk."""
    from bge_ds.kernels import max_logits_triton

    added_at_once = matmul._sums_in_fp32("meta", torch.bfloat16)  # asked once a process: not one of the calls
    found = []
    for runs in (RUNS, [LengthRun(len(LENGTHS) - 1, 4), LengthRun(1, sum(LENGTHS) - 4 * len(LENGTHS) + 4)]):
        calls = Calls()
        monkeypatch.setattr(max_logits_triton, "launch", lambda kernel, *_, c=calls, **__: c.names.append(kernel.__name__))
        shapes = ((sum(LENGTHS), 8), (37, 8), (37,))
        x, w, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta").requires_grad_() for shape in shapes)
        starts = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
        with calls:
            out = max_logits(x, w, b, starts, runs)
            out.sum().backward()
        assert out.shape == (len(LENGTHS), 37) and out.dtype == torch.float32
        assert [t.grad.dtype for t in (x, w, b)] == [torch.bfloat16] * 3
        found.append(calls.names)
    assert found[0] == found[1] and found[0].count("_maxima") == found[0].count("_gradient") == 1
    assert found[0].count("mm") == (2 if added_at_once else 3)


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernels as they are."""
    interpreter.run_again(__file__)
