"""The log-sum-exp without the matrix equals the plain one, with pairs excluded by place, key and value, on CPU and GPU paths.

The GPU's kernels run in Triton's interpreter: Triton decides at its first import whether it interprets, so
`test_in_the_interpreter` runs this file again in a process that has asked for it.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec

import helpers
import interpreter
import pytest
import torch

from bge_ds.kernels import linear_logsumexp as module
from bge_ds.kernels.linear_logsumexp import ExcludedPairs, equal_pairs, linear_logsumexp

# The Triton kernels take no fp64: its sums of 16 to 300 products, and of up to 700 shares, are fp32.
VARIANTS = [
    pytest.param(False, torch.float64, 1e-12, id="listed"),
    pytest.param(True, torch.float32, 2e-5, id="fused", marks=interpreter.only),
]


def problem(rows, columns, width, of_row, of_column, dtype):
    """Vectors, what is excluded of their pairs, and the same as a matrix of booleans made pair by pair."""
    generator = torch.Generator().manual_seed(rows + 31 * columns + of_row)
    x, w = (torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, columns))
    first = torch.randint(1, max(2, columns), (rows,), generator=generator).clamp_max(columns - 1)
    count = torch.minimum(torch.randint(0, 4, (rows,), generator=generator), columns - first)
    # Few different keys, at the ends of the range: rows share them with several columns, and list some twice.
    keys = torch.tensor([-(2**63), 2**63 - 1, 0, 7, 7 + 2**32, *range(100, 100 + columns)])
    row_keys, column_keys = (
        keys[torch.randint(len(keys), (n, k), generator=generator)] for n, k in ((rows, of_row), (columns, of_column))
    )
    column_keys[:1] = 5  # which no row has: no row is left without columns
    out = torch.tensor(
        [
            [f <= c < f + n or bool(set(of) & set(other)) for c, other in enumerate(column_keys.tolist())]
            for f, n, of in zip(first.tolist(), count.tolist(), row_keys.tolist(), strict=True)
        ]
    )
    return x.requires_grad_(), w.requires_grad_(), ExcludedPairs(first, count, row_keys, column_keys), out


def plain(x, w, out, limit):
    logits = x @ w.T
    over = torch.zeros_like(out) if limit is None else (logits > limit[:, None]) & ~out
    return logits.masked_fill(out | over, float("-inf")).logsumexp(1), over.sum(1)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("keys", [(0, 0), (1, 1), (3, 1), (1, 4)])
@pytest.mark.parametrize("shape", [(1, 7, 3), (37, 101, 5), (64, 2, 16), (5, 700, 8)])
@pytest.mark.parametrize(("fused", "dtype", "tolerance"), VARIANTS)
@pytest.mark.parametrize("block", [1, 250, 1 << 24])
def test_equals_the_plain_matrix(monkeypatch, shape, keys, block, limited, fused, dtype, tolerance):
    """Any block size, odd shapes, several keys of rows or columns: values, counts and gradients against full logits in fp64."""
    if fused and block == 1 and shape[0] > 30:
        pytest.skip("a row at a time is tried at the smaller shapes: the interpreter is slow")
    monkeypatch.setattr(module, "_GPU_ELEMENTS" if fused else "_BLOCK_ELEMENTS", block)
    x, w, excluded, out = problem(*shape, *keys, dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    # Between two logits of each row, so that rounding moves none across.
    limit = (exact[0] @ exact[1].T).detach().sort(1).values[:, -2:].mean(1).to(dtype) if limited else None
    ours, over = linear_logsumexp(x, w, excluded, limit, fused=fused)
    expected, expected_over = plain(*exact, out, limit)
    assert torch.allclose(ours.double(), expected, rtol=tolerance, atol=tolerance) and torch.equal(over, expected_over)
    assert not limited or over.any() or min(shape[:2]) <= 2
    given = torch.randn(shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = torch.autograd.grad(ours, (x, w), given.to(dtype))
    for a, b in zip(mine, torch.autograd.grad(expected, exact, given), strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=interpreter.only)])
def test_a_row_without_columns(fused):
    """Everything excluded: minus infinity, and gradients of zero rather than NaN."""
    x, w, *_ = problem(2, 3, 4, 0, 0, torch.float32)
    none = torch.empty(2, 0, dtype=torch.int64)
    excluded = ExcludedPairs(torch.tensor([0, 1]), torch.tensor([3, 1]), none, none[:1].expand(3, 0))
    value, _ = linear_logsumexp(x, w, excluded, fused=fused)
    assert value[0] == float("-inf") and value[1].isfinite()
    dx, dw = torch.autograd.grad(torch.logaddexp(value, torch.ones_like(value)).sum(), (x, w))
    assert not dx[0].any() and dx[1].any() and dw.isfinite().all()


@interpreter.only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_products_of_sixteen_bits(dtype, size):
    """Values and gradients are those of inputs rounded once, and weights rounded once; features of any magnitude fit fp16.

    (Rounded by the test itself: features to the type, in fp64 from there on.)
    """
    x, w, excluded, out = problem(37, 101, 16, 1, 1, torch.float32)
    x.data *= size / 8
    w.data /= size
    given = torch.linspace(-1e-6, 1e-6, 37)  # as a mean over a large batch gives it: below fp16's range
    value, _ = linear_logsumexp(x, w, excluded, narrow=dtype, fused=True)
    rounded = [(t.detach() / s).to(dtype).double().mul(s).requires_grad_() for t, s in ((x, size), (w, 1 / size))]
    expected, _ = plain(*rounded, out, None)
    step = torch.finfo(dtype).eps
    assert value.dtype == torch.float32 and (value - expected).abs().max() < step  # of logits up to 2
    mine = torch.autograd.grad(value, (x, w), given)
    for a, b in zip(mine, torch.autograd.grad(expected, rounded, given.double()), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 2 * step * b.abs().max()


@interpreter.only
def test_what_is_not_finite_is_seen():
    """A NaN or an infinite logit of a pair that counts comes out: the step is then skipped, not taken with a wrong loss."""
    for bad in (float("nan"), float("inf")):
        x, w, excluded, _ = problem(5, 700, 8, 0, 0, torch.float32)
        w.data[0] = bad
        assert not linear_logsumexp(x, w, excluded, fused=True)[0].isfinite().any()


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
@pytest.mark.parametrize("narrow", [torch.bfloat16, None])
def test_on_meta(narrow):
    """As a GPU would run it: nothing is read back."""
    x, w = (torch.empty(n, 8, device="meta").requires_grad_() for n in (500, 4000))
    first, keys = torch.empty(500, dtype=torch.int64, device="meta"), torch.empty(4000, 1, dtype=torch.int64, device="meta")
    excluded, limit = ExcludedPairs(first, first, keys[:500], keys), torch.empty(500, device="meta")
    value, over = linear_logsumexp(x, w, excluded, limit, narrow=narrow)
    value.sum().backward()
    assert value.dtype == torch.float32 and over.dtype == torch.int64 and x.grad.shape == x.shape and w.grad.shape == w.shape


def test_equal_pairs_finds_every_pair():
    """Also repeated values on both sides, and signed 64-bit hashes (stored from unsigned ones)."""
    left, right = torch.tensor([3, -5, 3, 8]), torch.tensor([-5, 3, 3, 9, -5])
    m, n = equal_pairs(left, right)
    found = sorted(zip(m.tolist(), n.tolist(), strict=True))
    assert found == [(i, j) for i in range(4) for j in range(5) if left[i] == right[j]]


def test_memory_is_linear_in_rows_plus_columns():
    """8,192 x 65,536 forward and backward in a process under 2 GB; its matrix of scores alone would be 2.1 GB in fp32."""
    command = helpers.program("kernel_memory", "logsumexp")
    result = subprocess.run(command, capture_output=True, text=True, env=helpers.environment())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2000


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernels as they are."""
    interpreter.run_again(__file__, "-k", "not memory")
