"""Dropout on the CPU, by itself and inside attention, without its two costs there: slow random numbers and stored scores.

Shapes: T tokens of texts in one row, R of them of one length, H heads, E features a head.

torch draws one Bernoulli number an element from a serial generator (7 ns each) and keeps the noise in the tensor's own type;
with dropout its attention falls back to plain products, three of whose L x L results wait for the backward pass. Here a
mask is 16 random bits an element, from numpy's SFC64, compared with p; it is kept as bytes, and attention keeps none: it
draws the same bits again in the backward pass and computes the scores anew. The probability is p to 1 / 65,536 and the
survivors are scaled by exactly its inverse. Seeds come from torch's generator: `torch.manual_seed` decides every mask, as
it does for torch's own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Masks:
    """A stream of masks, a function of its seed; keep: the share that stays."""

    def __init__(self, p: float, seed: int | None = None):
        self.seed = int(torch.randint(1 << 62, ())) if seed is None else seed
        self.p, self._random = p, np.random.Generator(np.random.SFC64(self.seed))
        dropped = round(p * 65536)
        self._threshold, self.keep = dropped - 32768, 1 - dropped / 65536

    def draw(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """bool: True stays."""
        elements = int(np.prod(shape))
        words = self._random.integers(0, 1 << 64, -(-elements // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16))[:elements]
        return (bits >= self._threshold).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        masks = Masks(p)
        kept = masks.draw(x.shape)
        ctx.save_for_backward(kept)
        ctx.keep = masks.keep
        return torch.where(kept, x, 0).div_(masks.keep)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return torch.where(kept, grad, 0).div_(ctx.keep), None


class Dropout(nn.Dropout):
    """nn.Dropout, with its own masks on the CPU."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu" or not 0 < self.p < 1:
            return F.dropout(x, self.p, self.training)
        return _Dropout.apply(x, self.p)


def use_fast_dropout(model: nn.Module) -> None:
    """Make every nn.Dropout of the model a `Dropout`. Names, weights and settings stay."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


# Scores held at a time: they stay in the processor's caches from the product to the softmax and the mask.
_BLOCK_ELEMENTS = 1 << 20


class _Attention(torch.autograd.Function):
    # One node for the whole row: what waits for the backward pass is q, k and v as they came, and nothing a text.
    # In fp32 whatever the inputs: on the CPU, 16-bit products of matrices this small are the slower ones.
    @staticmethod
    def forward(ctx, q, k, v, runs, scale, p, causal, window):
        masks = Masks(p)
        ctx.save_for_backward(q, k, v)
        ctx.settings = runs, scale, masks.seed, p, causal, window
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, shape, visible in _blocks(runs, q.shape[1], causal, window):
            q_b, k_b, v_b = (_heads(x[rows], shape) for x in (q, k, v))
            weights = _softmax(q_b, k_b, scale, visible)
            dropped = torch.where(masks.draw(weights.shape), weights, 0)
            _put(out, rows, shape, torch.bmm(dropped, v_b).div_(masks.keep))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        runs, scale, seed, p, causal, window = ctx.settings
        masks, qkv = Masks(p, seed), ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]
        for rows, shape, visible in _blocks(runs, grad.shape[1], causal, window):
            q, k, v, g = (_heads(x[rows], shape) for x in (*qkv, grad))
            weights = _softmax(q, k, scale, visible)
            dropped = torch.where(masks.draw(weights.shape), weights, 0)
            g = g / masks.keep
            # d softmax: w (g - sum w g), where g is already 0 at what was dropped.
            ds = torch.bmm(g, v.transpose(1, 2)).mul_(dropped)
            ds.addcmul_(weights, ds.sum(-1, keepdim=True), value=-1).mul_(scale)
            for out, part in zip(grads, ((ds, k), (ds.transpose(1, 2), q), (dropped.transpose(1, 2), g)), strict=True):
                _put(out, rows, shape, torch.bmm(*part))
        return *grads, None, None, None, None, None


def _blocks(runs, heads: int, causal: bool, window: int | None):
    """(rows of the row, (texts, length), visible) of each block: some texts of one length."""
    start = 0
    for texts, length in runs:
        visible = _visible(length, causal, window) if causal or (window is not None and window < length) else None
        step = max(1, _BLOCK_ELEMENTS // (heads * length * length))
        for first in range(0, texts, step):
            n = min(step, texts - first)
            yield slice(start, start + n * length), (n, length), visible
            start += n * length


@lru_cache(maxsize=64)
def _visible(length: int, causal: bool, window: int | None) -> torch.Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)
    reach = length if window is None else window
    return (i - j < reach) & ((j <= i) if causal else (j - i < reach))


def _heads(x_RHE: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Rows of texts of one length as (texts x heads) x length x E, at least fp32."""
    x = x_RHE.unflatten(0, shape).transpose(1, 2).flatten(0, 1)
    return x if x.dtype == torch.float64 else x.float()


def _put(out_THE: torch.Tensor, rows: slice, shape: tuple[int, int], x: torch.Tensor) -> None:
    out_THE[rows].unflatten(0, shape).copy_(x.unflatten(0, (shape[0], -1)).transpose(1, 2))


def _softmax(q, k, scale, visible):
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    if visible is not None:
        scores = scores.masked_fill_(~visible, float("-inf"))
    return scores.softmax(-1)


def attention_with_dropout(q_THE, k_THE, v_THE, runs, *, scale: float, p: float, causal=False, window=None) -> torch.Tensor:
    """softmax(q k^T scale) with dropout p, times v, of each text on itself: T x H x E.

    runs, causal and window as in `attention.varlen_attention`. On the CPU; no double backward.
    """
    return _Attention.apply(q_THE, k_THE, v_THE, runs, scale, p, causal, window)
