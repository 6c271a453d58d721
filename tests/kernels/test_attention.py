"""Attention within each text, whatever the way: compared with one text at a time, in a plain loop."""

from __future__ import annotations

import pytest
import torch

from bge_ds.data.batches import Run
from bge_ds.kernels.attention import choose, varlen_attention

RUNS = [Run(2, 1), Run(3, 5), Run(1, 9)]


def reference(q, k, v, scale, causal):
    out, start = [], 0
    repeat = q.shape[1] // k.shape[1]
    for texts, length in RUNS:
        for _ in range(texts):
            part = slice(start, start + length)
            qt, kt, vt = q[part].transpose(0, 1), k[part].transpose(0, 1), v[part].transpose(0, 1)
            kt, vt = kt.repeat_interleave(repeat, 0), vt.repeat_interleave(repeat, 0)
            scores = qt @ kt.transpose(1, 2) * scale
            if causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            out.append((scores.softmax(-1) @ vt).transpose(0, 1))
            start += length
    return torch.cat(out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_runs_equal_a_loop_over_texts(causal, key_heads):
    """Output and gradients of q, k, v; grouped keys; causal; texts of one token. fp64."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(n * length for n, length in RUNS)
    q, k, v = (
        torch.randn(tokens, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in (4, key_heads, key_heads)
    )
    lengths = torch.tensor([length for n, length in RUNS for _ in range(n)])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    ours = varlen_attention(q, k, v, cu_seqlens, RUNS, scale=0.3, causal=causal)
    expected = reference(q, k, v, 0.3, causal)
    assert (ours - expected).abs().max() < 1e-12
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        assert (mine - theirs).abs().max() < 1e-12


def test_dropout_is_applied_and_unbiased():
    """With dropout the output changes from call to call and averages to the one without."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(26, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 1, 2, 7, 12, 17, 26], dtype=torch.int32)
    plain = varlen_attention(q, k, v, cu_seqlens, RUNS, scale=0.3)
    draws = torch.stack([varlen_attention(q, k, v, cu_seqlens, RUNS, scale=0.3, dropout=0.2) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).abs().max() < 0.1


def test_the_choice():
    """Flash attention only where it computes the same thing: CUDA, 16 bits, no dropout it would leave out."""
    assert choose("cpu", torch.bfloat16, 64, 0.0, False) == "runs"
    assert choose("cuda", torch.float32, 64, 0.0, False) == "runs"
    assert choose("cuda", torch.bfloat16, 64, 0.0, False) == "varlen"
    assert choose("cuda", torch.bfloat16, 64, 0.1, False) in ("flash_attn", "runs")
    assert choose("cuda", torch.bfloat16, 20, 0.0, False) == "runs"
