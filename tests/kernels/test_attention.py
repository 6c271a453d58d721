"""Attention within each text, whatever the way: compared with one text at a time, in a plain loop."""

from __future__ import annotations

import pytest
import torch

from bge_ds.data.batches import Run
from bge_ds.kernels.attention import choose, varlen_attention

RUNS = [Run(2, 1), Run(3, 5), Run(1, 9)]
LONG_RUNS = [*RUNS, Run(2, 600)]  # more than two blocks of queries where a window cuts


def reference(q, k, v, scale, causal, window=None, runs=RUNS):
    out, start = [], 0
    repeat = q.shape[1] // k.shape[1]
    for texts, length in runs:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (distance.abs() >= window)
        for _ in range(texts):
            part = slice(start, start + length)
            qt, kt, vt = q[part].transpose(0, 1), k[part].transpose(0, 1), v[part].transpose(0, 1)
            kt, vt = kt.repeat_interleave(repeat, 0), vt.repeat_interleave(repeat, 0)
            scores = (qt @ kt.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
            out.append((scores.softmax(-1) @ vt).transpose(0, 1))
            start += length
    return torch.cat(out)


def row(runs, key_heads=4, head_dim=8):
    """Random q, k, v (fp64) and cu_seqlens of a row."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(n * length for n, length in runs)
    lengths = torch.tensor([length for n, length in runs for _ in range(n)])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    shapes = [(tokens, heads, head_dim) for heads in (4, key_heads, key_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes], cu_seqlens


def assert_same(ours, expected, leaves):
    assert (ours - expected).abs().max() < 1e-12
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(out, leaves, weights) for out in (ours, expected))
    assert max((a - b).abs().max() for a, b in zip(mine, theirs, strict=True)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_runs_equal_a_loop_over_texts(causal, key_heads):
    """Output and gradients of q, k, v; grouped keys; causal; texts of one token. fp64."""
    qkv, cu_seqlens = row(RUNS, key_heads)
    ours = varlen_attention(*qkv, cu_seqlens, RUNS, scale=0.3, causal=causal)
    assert_same(ours, reference(*qkv, 0.3, causal), qkv)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 5, 70, 300, 1000])
def test_a_window_cuts_what_is_further(causal, window):
    """Output and gradients with a window that is shorter than, as long as and longer than texts and blocks of queries."""
    qkv, cu_seqlens = row(LONG_RUNS, key_heads=2)
    ours = varlen_attention(*qkv, cu_seqlens, LONG_RUNS, scale=0.3, causal=causal, window=window)
    assert_same(ours, reference(*qkv, 0.3, causal, window, LONG_RUNS), qkv)


def test_a_window_that_shows_nothing_is_refused():
    """Window 0 is an error, not a row of NaN."""
    qkv, cu_seqlens = row(RUNS)
    with pytest.raises(ValueError, match="window 0"):
        varlen_attention(*qkv, cu_seqlens, RUNS, scale=0.3, window=0)


@pytest.mark.parametrize("window", [None, 3])
def test_dropout_is_applied_and_unbiased(window):
    """With dropout the output changes from call to call and averages to the one without."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(26, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 1, 2, 7, 12, 17, 26], dtype=torch.int32)
    plain = varlen_attention(q, k, v, cu_seqlens, RUNS, scale=0.3, window=window)
    draws = torch.stack(
        [varlen_attention(q, k, v, cu_seqlens, RUNS, scale=0.3, window=window, dropout=0.2) for _ in range(3000)]
    )
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).abs().max() < 0.1


def test_the_choice():
    """Flash attention only where it computes the same thing: CUDA, 16 bits, no dropout it would leave out."""
    assert choose("cpu", torch.bfloat16, 64, 0.0, False) == "runs"
    assert choose("cuda", torch.float32, 64, 0.0, False) == "runs"
    assert choose("cuda", torch.bfloat16, 64, 0.0, False) == "varlen"
    assert choose("cuda", torch.bfloat16, 64, 0.1, False) in ("flash_attn", "runs")
    assert choose("cuda", torch.bfloat16, 20, 0.0, False) == "runs"
