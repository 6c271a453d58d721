"""The fused attention of whole texts against the formula in fp64, in Triton's interpreter.

Triton decides at its first import whether it interprets, so `test_in_the_interpreter` runs this file again in a process that
has asked for it.
"""

from __future__ import annotations

import interpreter
import pytest
import torch
from test_attention import reference

from bge_ds.kernels.attention import varlen_attention
from bge_ds.kernels.packed import LengthRun

RUNS = [LengthRun(1, 1), LengthRun(1, 2), LengthRun(2, 3), LengthRun(2, 5), *(LengthRun(1, n) for n in (64, 65, 150))]


class Row:
    """Random q, k, v of texts of these lengths; 4 heads of queries."""

    def __init__(self, runs=RUNS, key_heads=4, head_dim=16, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([length for n, length in runs for _ in range(n)])
        self.runs = runs
        self.scale = 1.2 * head_dim**-0.5  # scores of one size for every head, so that one tolerance fits all
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        self.qkv = [
            torch.randn(int(lengths.sum()), heads, head_dim, generator=generator).to(dtype).requires_grad_()
            for heads in (4, key_heads, key_heads)
        ]
        self.weights = torch.randn(self.qkv[0].shape, generator=generator).to(dtype)

    def attend(self, **settings):
        return varlen_attention(*self.qkv, self.cu_seqlens, self.runs, scale=self.scale, backend="fused", **settings)

    def assert_same(self, tolerance, causal=False, window=None):
        out = self.attend(causal=causal, window=window)
        leaves = [x.detach().double().requires_grad_() for x in self.qkv]
        expected = reference(*leaves, self.scale, causal, window, self.runs)
        ours = [out, *torch.autograd.grad(out, self.qkv, self.weights)]
        theirs = [expected, *torch.autograd.grad(expected, leaves, self.weights.double())]
        for mine, exact in zip(ours, theirs, strict=True):
            # A window of one token has gradients of exactly 0 for queries and keys.
            assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1.0)


@interpreter.only
@pytest.mark.parametrize(
    ("key_heads", "window", "causal"),
    [*((4, window, causal) for window in (None, 1, 3, 65) for causal in (False, True)), (2, None, True), (2, 3, False)],
)
def test_equals_the_formula(key_heads, window, causal):
    """Output and gradients of q, k and v: whole texts, what precedes, windows that cut, grouped heads, odd lengths."""
    Row(key_heads=key_heads).assert_same(2e-6, causal, window)


@interpreter.only
@pytest.mark.parametrize("head_dim", [20, 32, 64, 80, 128, 256])
def test_any_head_size(head_dim):
    """Heads of 20 to 256 features, one group of all heads; tiles are wider than a head that is no power of two."""
    Row([LengthRun(2, 3), LengthRun(1, 70)], key_heads=1, head_dim=head_dim).assert_same(4e-6, causal=head_dim % 64 == 0)


@interpreter.only
def test_sixteen_bits():
    """fp16 inputs: products in 16 bits, sums in fp32."""
    Row([LengthRun(2, 5), LengthRun(1, 70)], dtype=torch.float16, head_dim=32).assert_same(4e-3, window=9)


@interpreter.only
def test_a_text_out_of_order():
    """A last text shorter than those before it: places come from cu_seqlens, not from the order by length."""
    Row([LengthRun(1, 70), LengthRun(2, 9), LengthRun(1, 33)]).assert_same(2e-6)


@interpreter.only
def test_dropout_and_its_replay():
    """The share asked for is dropped, anew for each row and head; one seed gives one mask, in the backward as well.

    With values that name the keys (the identity), a row's output is its dropped weights: the mask that the gradients of a
    second call, with the same seed and other values, are held against.
    """
    length = 64
    row = Row([LengthRun(1, length)], key_heads=2, head_dim=length)
    q, k, v = row.qkv
    row.qkv = [q, k, torch.eye(length)[:, None].expand(length, 2, length).contiguous()]
    torch.manual_seed(5)
    kept = row.attend(dropout=0.3).detach().permute(1, 0, 2) != 0
    assert abs(kept.float().mean().item() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(row.attend(dropout=0.3).permute(1, 0, 2) != 0, kept)
    row.qkv = [q, k, v]
    torch.manual_seed(5)
    out = row.attend(dropout=0.3)
    leaves = [x.detach().double().requires_grad_() for x in row.qkv]
    q, k, v = (x.transpose(0, 1) for x in leaves)
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    expected = ((q @ k.mT * row.scale).softmax(-1) * kept / 0.7 @ v).transpose(0, 1)
    ours = [out, *torch.autograd.grad(out, row.qkv, row.weights)]
    theirs = [expected, *torch.autograd.grad(expected, leaves, row.weights.double())]
    for mine, exact in zip(ours, theirs, strict=True):
        assert (mine.double() - exact).abs().max() <= 2e-5 * exact.abs().max()


@interpreter.runs_again
def test_in_the_interpreter():
    """Every test above, with the kernels as they are."""
    interpreter.run_again(__file__, "-W", "error::RuntimeWarning")
