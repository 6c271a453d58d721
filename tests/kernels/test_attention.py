"""Attention within each text, whatever the backend: compared with one text at a time, in a plain loop."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bge_ds.kernels import attention, triton_support
from bge_ds.kernels.attention import attention_backend, varlen_attention, why_slow
from bge_ds.kernels.packed import LengthRun

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")

RUNS = [LengthRun(2, 1), LengthRun(3, 5), LengthRun(1, 9)]
LONG_RUNS = [*RUNS, LengthRun(2, 600)]  # more than two blocks of queries where a window cuts


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


def test_the_backend_chosen(monkeypatch):
    """On a GPU one call a row in every type and head size there is; the loop over lengths for the CPU, and never in silence."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    attention._has_flash.cache_clear()
    assert attention_backend("cpu", torch.bfloat16, 64) == "runs" and why_slow("cpu", torch.bfloat16, 64) is None
    for head_dim in (16, 20, 64, 128, 256):
        for dtype, backend in (torch.bfloat16, "flash"), (torch.float16, "flash"), (torch.float32, "fused"):
            assert attention_backend("cuda", dtype, head_dim) == backend
        assert why_slow("cuda", torch.float32, head_dim) is None
    assert attention_backend("cuda", torch.bfloat16, 512) == "runs"
    assert why_slow("cuda", torch.bfloat16, 512) == "heads of 512 features in bfloat16 have no kernel"
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert why_slow("cuda", torch.float32, 64) == "the triton package is not installed"
    attention._has_flash.cache_clear()


@needs_triton
@pytest.mark.parametrize("backend", ["flash", "fused"])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (2, 20)])
def test_gpu_backends_are_one_call_and_read_nothing_back(monkeypatch, backend, heads, head_dim):
    """On the meta device, where every look at a value is an error: forward and backward, all settings, each one call."""
    from bge_ds.kernels import attention_triton

    runs = LONG_RUNS
    tokens, texts = sum(n * length for n, length in runs), sum(n for n, _ in runs)
    launched = []
    monkeypatch.setattr(attention_triton, "launch", lambda kernel, *args, **kwargs: launched.append(kernel))
    for causal, window, dropout in [(False, None, 0.1), (True, None, 0.0), (False, 5, 0.1), (True, 70, 0.1)]:
        dtype = torch.bfloat16 if backend == "flash" else torch.float32
        q, k, v = (torch.empty(tokens, h, head_dim, device="meta", dtype=dtype).requires_grad_() for h in (4, heads, heads))
        cu_seqlens = torch.empty(texts + 1, device="meta", dtype=torch.int32)
        assert attention_backend("meta", dtype, head_dim) == backend
        launched.clear()
        with CallCount() as calls:
            out = varlen_attention(q, k, v, cu_seqlens, runs, scale=0.3, causal=causal, window=window, dropout=dropout)
        assert out.shape == q.shape and sum("attention_forward" in name for name in calls.names) == (backend == "flash")
        assert len(launched) == (backend == "fused")
        out.float().sum().backward()
        assert len(launched) == (3 if backend == "fused" else 0)  # forward, gradient of the queries, of keys and values
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


class CallCount(TorchDispatchMode):
    """The names of the operations called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
