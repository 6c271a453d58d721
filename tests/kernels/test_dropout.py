"""Dropout of our own: the share asked for, unbiased, decided by torch's seed; attention with it is its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bge_ds.data.batches import Run
from bge_ds.kernels import dropout
from bge_ds.kernels.dropout import Dropout, Masks, attention_with_dropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_scale(p):
    """A share p is 0 within 4 standard errors, whatever its neighbours are, and the rest is scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    x = torch.ones(1_000_003)  # no multiple of the four masks in a random word
    y = Dropout(p)(x)
    gone = y == 0
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(gone.double().mean().item() - p) < 4 * error
    for lag in (1, 2, 3, 4):
        assert abs((gone[lag:] & gone[:-lag]).double().mean().item() - p * p) < 4 * error
    assert torch.allclose(y[~gone], torch.tensor(1 / (1 - p)), rtol=1e-4)


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(1000, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert torch.allclose(x.grad, y.detach() / x.detach())


def test_the_seed_decides():
    """torch.manual_seed repeats every mask; without that, a piece computed twice (GradCache) would differ from itself."""
    x = torch.ones(100)
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first) and not torch.equal(first, second)


def test_evaluation_changes_nothing():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x


def test_swapping_keeps_names_and_settings():
    """Only nn.Dropout itself is replaced, in place."""
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25)), "b": nn.Dropout1d(0.5)})
    names = [name for name, _ in model.named_modules()]
    use_fast_dropout(model)
    assert [name for name, _ in model.named_modules()] == names
    assert type(model["a"][1]) is Dropout and model["a"][1].p == 0.25 and type(model["b"]) is nn.Dropout1d


RUNS = [Run(2, 1), Run(3, 5), Run(1, 9)]


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 4)])
@pytest.mark.parametrize("block", [1, 150, 1 << 20])
def test_attention_is_its_formula(monkeypatch, causal, window, block):
    """Output and gradients for the very masks that were drawn, text by text, in blocks of any size (fp64)."""
    monkeypatch.setattr(dropout, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(26, 2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    torch.manual_seed(3)
    out = attention_with_dropout(q, k, v, RUNS, scale=0.4, p=0.3, causal=causal, window=window)
    torch.manual_seed(3)
    masks, expected, start = Masks(0.3), [], 0
    for texts, length in RUNS:
        # Masks are drawn block by block, and a number of random bits is rounded up to four: each draw counts.
        step = max(1, block // (2 * length * length))
        kept = torch.cat([masks.draw((2 * min(step, texts - n), length, length)) for n in range(0, texts, step)])
        for n in range(texts):
            part = slice(start, start + length)
            scores = torch.einsum("ihe,jhe->hij", q[part], k[part]) * 0.4
            far = torch.arange(length)[:, None] - torch.arange(length)
            seen = (far.abs() < (window or 99)) & ((far >= 0) | (not causal))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1) * kept[2 * n : 2 * n + 2] / masks.keep
            expected.append(torch.einsum("hij,jhe->ihe", weights, v[part]))
            start += length
    expected = torch.cat(expected)
    assert (out - expected).abs().max() < 1e-12
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(y, (q, k, v), weights) for y in (out, expected)), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


def test_sixteen_bit_attention_is_computed_in_fp32():
    """bf16 in, bf16 out: the fp32 result for the same masks, rounded once."""
    q, k, v = (torch.randn(26, 2, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
    torch.manual_seed(3)
    exact = attention_with_dropout(q.float(), k.float(), v.float(), RUNS, scale=0.3, p=0.2)
    torch.manual_seed(3)
    half = attention_with_dropout(q, k, v, RUNS, scale=0.3, p=0.2)
    assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())
